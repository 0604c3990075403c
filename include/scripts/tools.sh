# shellcheck shell=bash
# Sourced: appends the Debian packages that install.sh unpacked for an ordinary user to the PATH.
export PATH="$PATH:/usr/sbin:/sbin"
# Homebrew's rsync comes before Apple's, however make was started.
[ "$(uname)" != Darwin ] || export PATH="/opt/homebrew/bin:/usr/local/bin:$PATH"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.env/tools/root
if [ -d "$root" ]; then
  machine=$(uname -m)
  export PATH="$PATH:$root/usr/bin:$root/usr/sbin:$root/bin:$root/sbin"
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$root/usr/lib/$machine-linux-gnu:$root/lib/$machine-linux-gnu"
fi
