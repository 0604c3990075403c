# Sourced: puts the Debian packages that install.sh unpacked for an ordinary user behind the machine's own.
export PATH="$PATH:/usr/sbin:/sbin"
if [ -d .env/tools/root ]; then
  root=$PWD/.env/tools/root
  export PATH="$PATH:$root/usr/bin:$root/usr/sbin:$root/bin:$root/sbin"
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$root/usr/lib/$(uname -m)-linux-gnu:$root/lib/$(uname -m)-linux-gnu"
fi
