# Sourced: puts the Debian packages that install.sh unpacked for an ordinary user behind the machine's own.
export PATH="$PATH:/usr/sbin:/sbin"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.env/tools/root
if [ -d "$root" ]; then
  export PATH="$PATH:$root/usr/bin:$root/usr/sbin:$root/bin:$root/sbin"
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$root/usr/lib/$(uname -m)-linux-gnu:$root/lib/$(uname -m)-linux-gnu"
fi
