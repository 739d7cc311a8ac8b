#!/bin/busybox sh
# First process of the guest. Its root is the host's, read-only, under a tmpfs that takes what is
# written. Then it runs the agent, whose command line is in /proc/cmdline as hexadecimal words.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec >/dev/console 2>&1
fail() { echo "GUEST-FAILED $*"; poweroff -f; }
while read -r module; do
  insmod "/modules/$module" || echo "GUEST-MODULE $module was not loaded"
done </modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro host /host || fail "no 9p"
mount -t tmpfs -o size=75% tmpfs /overlay || fail "no tmpfs"
mkdir /overlay/upper /overlay/work
mount -t overlay -o lowerdir=/host,upperdir=/overlay/upper,workdir=/overlay/work overlay /root ||
  fail "no overlay"
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -o bind /dev /root/dev
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm
mount -t tmpfs tmpfs /root/run
ln -s /proc/self/fd /root/dev/fd
ip link set lo up
agent=
for word in $(cat /proc/cmdline); do
  case "$word" in kvstore.agent=*) agent=${word#kvstore.agent=} ;; esac
done
echo "GUEST-BOOTED $(uname -r) after $(cut -d' ' -f1 /proc/uptime) s"
cd /root || fail "no root"
old_ifs=$IFS
IFS=,
set --
for word in $agent; do set -- "$@" "$(printf %s "$word" | xxd -r -p)"; done
IFS=$old_ifs
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot /root "$@" || echo "GUEST-FAILED agent ended with $?"
poweroff -f
