class QParams:
    power_2_scale = False
    amax_epsilon = 0.0


class Float8CurrentScaling:
    fp8_quant_fwd_weight = QParams()
