#!/usr/bin/env bash
# Makes the lab's guest image: a distribution kernel and an initramfs of busybox and ./init.
# Called by `lab up`. Usage: build.sh KERNEL_ROOT OUT_DIR
# Writes OUT_DIR/dalgu-guest.kernel and OUT_DIR/dalgu-guest.initrd; does nothing if no input changed.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
kernel_root=$1
out=$2
# Those that the kernel has built in are skipped.
modules=(virtio_pci virtio_blk virtio_net virtio_balloon virtio_mem virtio_console virtio-rng button evdev
    af_packet ipv6 vfat nls_cp437 nls_ascii nls_iso8859-1 nls_utf8)

kernel=$(compgen -G "$kernel_root/boot/vmlinuz-*" | head -n 1) || { echo "no kernel below $kernel_root: run make setup" >&2; exit 1; }
release=${kernel##*/vmlinuz-}
busybox=$(command -v busybox) || { echo "busybox is not installed: run make setup" >&2; exit 1; }

# Two labs may come up at the same time.
mkdir -p "$out"
exec 9>"$out/lock"
flock 9

inputs=$( { cat "$here/init" "$here/build.sh" "$busybox"; echo "$release"; } | sha256sum)
if [ -e "$out/dalgu-guest.inputs" ] && [ "$(cat "$out/dalgu-guest.inputs")" = "$inputs" ]; then exit 0; fi

# A bzImage unpacks itself, which under emulation is a quarter of a boot. What it holds is an ELF file that QEMU can start as well.
# Where it lies is said in the boot protocol's header (Documentation/arch/x86/boot.rst of the kernel: setup_sects,
# payload_offset, payload_length); after all but gzip's data come 4 bytes that tell its length.
number_at() { od -An -v -t "u$2" -j "$1" -N "$2" "$kernel" | tr -d ' '; }
unpack_kernel() {
    local from=$((($(number_at 497 1) + 1) * 512 + $(number_at 584 4))) length unpack
    case $(od -An -v -t x1 -j "$from" -N 4 "$kernel" | tr -d ' ') in
        1f8b*) unpack=(gzip -dc) ;;
        fd377a58) unpack=(xz -dc) ;;
        28b52ffd) unpack=(zstd -qdc) ;;
        02214c18) unpack=(lz4 -qdc) ;;
        *) echo "unknown compression: $kernel" >&2; return 1 ;;
    esac
    length=$(number_at 588 4)
    [ "${unpack[0]}" = gzip ] || length=$((length - 4))
    dd if="$kernel" iflag=skip_bytes,count_bytes skip="$from" count="$length" bs=1M status=none | "${unpack[@]}"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,modules,etc/acpi/PWRF}
install -m 755 "$busybox" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
install -m 755 "$here/init" "$root/init"
printf '#!/bin/sh\nsync\npoweroff -f\n' >"$root/etc/acpi/PWRF/00000080"
chmod 755 "$root/etc/acpi/PWRF/00000080"

# Modules go in flat, uncompressed, and listed in the order in which they load.
mkdir -p "$work/deps/lib"
ln -s "$(cd "$kernel_root" && pwd)/lib/modules" "$work/deps/lib/modules"
[ -e "$kernel_root/lib/modules/$release/modules.dep.bin" ] || depmod -b "$work/deps" "$release"
for module in "${modules[@]}"; do
    modprobe -d "$work/deps" -S "$release" --show-depends "$module" 2>/dev/null || true
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/list"
while read -r file; do
    name=$(basename "$file")
    case $name in
        *.ko) cp "$file" "$root/modules/$name" ;;
        *.ko.xz) xz -dc "$file" >"$root/modules/${name%.xz}" ;;
        *.ko.zst) zstd -qdc "$file" >"$root/modules/${name%.zst}" ;;
        *.ko.gz) gzip -dc "$file" >"$root/modules/${name%.gz}" ;;
        *) echo "unknown module format: $file" >&2; exit 1 ;;
    esac
    echo "${name%%.ko*}.ko" >>"$root/modules/order"
done <"$work/list"
touch "$root/modules/order"

# No compression: unpacking it under emulation would cost more than reading it.
(cd "$root" && find . -print0 | LC_ALL=C sort -z |
    cpio --quiet --null -o -H newc --owner 0:0 --reproducible) >"$work/initrd"
unpack_kernel >"$work/kernel"
install -m 644 "$work/kernel" "$out/dalgu-guest.kernel"
install -m 644 "$work/initrd" "$out/dalgu-guest.initrd"
printf '%s\n' "$inputs" >"$out/dalgu-guest.inputs"
echo "guest: made from kernel $release ($(wc -l <"$root/modules/order") modules)"
