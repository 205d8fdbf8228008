#!/usr/bin/env bash
# Makes a disk image of this machine's own release (Debian, Ubuntu) from its packages: a kernel, systemd, cloud-init, an SSH
# server and QEMU's guest agent, as a site would make its standard template. It boots by BIOS, speaks on the serial console,
# takes its settings from a NoCloud medium, and grows to the disk it is given. No mount and no loop device is needed.
# Called by `make lab-image`, as root. Usage: build.sh OUT.qcow2
# Does nothing if neither this file nor the packages offered have changed.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
out=$1
suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
tools=(mmdebstrap syslinux syslinux-common mtools dosfstools e2fsprogs fdisk qemu-utils)
packages=(
    systemd-sysv udev dbus cloud-init cloud-guest-utils openssh-server qemu-guest-agent initramfs-tools
    iproute2 iputils-ping netbase e2fsprogs ca-certificates sudo
)
boot_mib=192
root_mib=1600

say() { printf 'lab-image: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || die "must run as root"
case $suite in '') die "/etc/os-release names no release" ;; esac

missing=()
for package in "${tools[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
mkdir -p "$(dirname -- "$out")"
log=$out.log
apt() { DEBIAN_FRONTEND=noninteractive apt-get -q=2 -o DPkg::Lock::Timeout=600 "$@"; }
if [ "${#missing[@]}" -gt 0 ]; then
    say "packages to install: ${missing[*]}"
    apt update
    apt install --no-install-recommends -y "${missing[@]}" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
fi

kernel=linux-image-cloud-amd64
offered=$(apt-cache policy "$kernel")
case $offered in *'Candidate: (none)'* | '') kernel=linux-image-virtual ;; esac
packages+=("$kernel")
# The resolver that takes its servers from DHCP is a package of its own in newer releases.
resolver=systemd-resolved
case $(apt-cache policy "$resolver") in *'Candidate: (none)'* | '') ;; *) packages+=("$resolver") ;; esac

inputs=$( { cat "$here/build.sh"; apt-cache policy "${packages[@]}" | grep '^  Candidate:'; } | sha256sum)
if [ -e "$out" ] && [ "$(cat "$out.inputs" 2>/dev/null)" = "$inputs" ]; then
    say "$out is there"
    exit 0
fi

# Where the machine's own packages come from, backports left out.
mapfile -t sources < <(grep -lsE "^(deb .*|Suites:.*) $suite( |\$)" /etc/apt/sources.list /etc/apt/sources.list.d/*.list \
    /etc/apt/sources.list.d/*.sources || true)
[ "${#sources[@]}" -gt 0 ] || die "no apt source for $suite was found"

work=$(mktemp -d "$(dirname -- "$out")/image.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root
say "installing $suite with ${#packages[@]} packages (a few minutes)"
mmdebstrap --quiet --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
    --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$suite" "$root" "${sources[@]}" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }

say "settings"
cat >"$root/etc/fstab" <<'FSTAB'
LABEL=root / ext4 errors=remount-ro 0 1
FSTAB
# Nothing but the medium is asked, so that no boot waits for a metadata server.
cat >"$root/etc/cloud/cloud.cfg.d/90-datasource.cfg" <<'CLOUD'
datasource_list: [ NoCloud, None ]
CLOUD
systemctl --root="$root" --quiet enable systemd-networkd.service systemd-resolved.service
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
# Each machine that is made from the image gets its own.
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/hostname" "$root/var/lib/dbus/machine-id"
echo uninitialized >"$root/etc/machine-id"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/log/*.log "$root"/tmp/*

say "disk"
signature=da190001
kernel_file=$(compgen -G "$root/boot/vmlinuz-*" | sort -V | tail -n 1) || die "the packages brought no kernel"
initrd_file=$root/boot/initrd.img-${kernel_file##*/vmlinuz-}
[ -e "$initrd_file" ] || die "no initial RAM disk was made for ${kernel_file##*/}"
cat >"$work/syslinux.cfg" <<SYSLINUX
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
  LINUX /vmlinuz
  INITRD /initrd.img
  APPEND root=PARTUUID=$signature-02 ro console=tty0 console=ttyS0,115200n8 net.ifnames=0
SYSLINUX
boot=$work/boot.img
truncate -s "${boot_mib}M" "$boot"
mkfs.vfat -n BOOT "$boot" >"$log"
mcopy -i "$boot" "$kernel_file" ::/vmlinuz
mcopy -i "$boot" "$initrd_file" ::/initrd.img
mcopy -i "$boot" "$work/syslinux.cfg" ::/syslinux.cfg
syslinux --install "$boot"
# They are read from the boot partition only.
rm -f "$root"/boot/vmlinuz-* "$root"/boot/initrd.img-*
mke2fs -q -t ext4 -L root -d "$root" "$work/root.img" "${root_mib}M"

disk=$work/disk.raw
truncate -s "$((boot_mib + root_mib + 2))M" "$disk"
sfdisk --quiet "$disk" <<SFDISK
label: dos
label-id: 0x$signature
start=2048, size=$((boot_mib * 2048)), type=c, bootable
start=$((2048 + boot_mib * 2048)), size=$((root_mib * 2048)), type=83
SFDISK
dd if=/usr/lib/syslinux/mbr/mbr.bin of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$boot" of="$disk" bs=1M seek=1 conv=notrunc,sparse status=none
dd if="$work/root.img" of="$disk" bs=1M seek="$((1 + boot_mib))" conv=notrunc,sparse status=none
qemu-img convert -q -f raw -O qcow2 "$disk" "$work/disk.qcow2"
chmod 644 "$work/disk.qcow2"
mv "$work/disk.qcow2" "$out"
printf '%s\n' "$inputs" >"$out.inputs"
say "$out: $(($(stat -c %s "$out") >> 20)) MiB"
