import pytest

from fastcpt.gpus import HardwareError, find_gpu, gpu_table
from fastcpt.planning.hardware import hardware_of, named_hardware, prices_source
from fastcpt.recipe_sections import Cluster

FACTS = {
    "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_gb": 85.52, "driver": "580"}] * 2,
    "memory_gb": 128.0,
    "disk_free_gb": 64.0,
    "cores": 16,
}


@pytest.mark.parametrize(
    ("name", "gpu", "count", "hosts"),
    [("4xB200", "B200", 4, 1), ("16xB200", "B200", 16, 2), ("1 x h100", "H100", 1, 1)],
)
def test_a_name_gives_the_cluster(name, gpu, count, hosts):
    hardware = named_hardware(name)
    assert (hardware.gpu.name, hardware.count, hardware.hosts) == (gpu, count, hosts)


@pytest.mark.parametrize("name", ["B200", "0xB200", "4xB200; rm -rf /", "fourxB200"])
def test_what_is_no_cluster_is_refused(name):
    with pytest.raises(HardwareError):
        named_hardware(name)


def test_an_unknown_gpu_says_where_to_add_it():
    with pytest.raises(HardwareError, match=r"'MI300X' is not in gpus.yaml"):
        named_hardware("8xMI300X")


@pytest.mark.parametrize(
    ("nvidia_smi", "known"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"),
     ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
     ("NVIDIA A100 80GB PCIe", "A100-PCIe"), ("NVIDIA H100 PCIe", "H100-PCIe"),
     ("NVIDIA H100 NVL", "H100-NVL"), ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200-NVL"),
     ("h100 sxm5 80 GB", "H100"), ("H200-141GB", "H200"), ("A100-40GB", "A100-40GB")],
)  # fmt: skip
def test_nvidia_smis_names_are_known(nvidia_smi, known):
    assert find_gpu(nvidia_smi).name == known


@pytest.mark.parametrize(
    "name",
    ["H100 80GB HBM3 MIG 3g.40gb", "H100-96GB", "A100-64GB", "GH200 480GB", "H20", "B200 Max-Q"],
)
def test_a_card_that_the_table_does_not_tell_apart_is_refused(name):
    with pytest.raises(HardwareError, match=r"is not in gpus.yaml.*add its figures there"):
        find_gpu(name)


def test_every_card_of_the_table_is_found_by_its_name():
    for name, gpu in gpu_table().items():
        assert named_hardware(f"2x{name}").name == f"2x{name}"
        assert find_gpu(name) == gpu


def test_cards_have_their_own_memory_peak_and_link():
    """By NVIDIA's data sheets: dense, without sparsity."""
    forty = named_hardware("2xA100-40GB").gpu
    assert (forty.memory_gb, forty.memory_tb_s) == (42.9, 1.555)
    pcie, nvl, sxm = (find_gpu(name) for name in ("H100-PCIe", "H100-NVL", "H100"))
    assert (pcie.bf16, pcie.fp8, pcie.memory_tb_s) == (0.756, 1.513, 2.0)
    assert (nvl.bf16, nvl.fp8, nvl.memory_tb_s) == (0.835, 1.671, 3.9)
    assert pcie.link_gb_s == nvl.link_gb_s < sxm.link_gb_s / 8


def test_a_seen_card_of_another_size_is_refused():
    facts = {**FACTS, "gpus": [{"name": "NVIDIA H100", "memory_gb": 42.9}]}
    with pytest.raises(HardwareError, match=r"NVIDIA H100 has 42.9 GB, a H100 85.5: it is another"):
        hardware_of(Cluster(gpus=1), facts)


def test_what_was_seen_takes_the_place_of_the_table():
    hardware = hardware_of(Cluster(gpus=2), FACTS)
    assert (hardware.name, hardware.gpu.memory_gb) == ("2xH100", 85.52)
    assert (hardware.host_memory_gb, hardware.disk_free_gb) == (128.0, 64.0)


def test_the_recipe_says_how_many_hosts_more():
    assert hardware_of(Cluster(gpus=4, hosts=["second"]), FACTS).hosts == 2


def test_unequal_gpus_are_refused():
    mixed = {**FACTS, "gpus": [FACTS["gpus"][0], {"name": "NVIDIA H200", "memory_gb": 150.7}]}
    with pytest.raises(HardwareError, match="mixes NVIDIA H100 80GB HBM3 and NVIDIA H200"):
        hardware_of(Cluster(gpus=2), mixed)


def test_a_login_host_without_gpus_is_planned_by_the_recipes_word():
    facts = {**FACTS, "gpus": []}
    assert hardware_of(Cluster(gpus=8, gpu="H200", launcher="slurm"), facts).name == "8xH200"


def test_cpus():
    assert hardware_of(Cluster(gpus=2, cpu_only=True), FACTS).gpu is None


def test_peaks_and_prices_carry_their_date():
    table = gpu_table()
    assert (table["H100"].bf16, table["H100"].fp8, table["B200"].fp8) == (0.989, 1.979, 4.5)
    assert table["A100"].fp8 is None
    assert "2026-03-10" in prices_source()
