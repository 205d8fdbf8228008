#!/bin/sh
# Checks the units, the user and the directories, without systemd running and without Dalgu being installed.
#
# Called by `make test` and after a change to this directory; prints systemd's rating of how exposed each service is.
# It puts the files into a temporary root with stand-ins for the binaries, so that `systemd-analyze verify` finds all
# that the units refer to. Fails on any remark, or when a rating is worse than the limit below. Changes nothing else.
set -eu

# Most exposure allowed, in tenths: 0 is none, 100 is all. The agent is root, for reasons told in its unit.
limit_controller=15
limit_agent=40

cd "$(dirname "$0")"
for tool in systemd-analyze systemd-sysusers systemd-tmpfiles; do
    command -v "$tool" >/dev/null || { echo "check.sh: $tool is missing: install systemd" >&2; exit 2; }
done

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT INT TERM
units=$root/usr/lib/systemd/system
mkdir -p "$units" "$root/usr/bin" "$root/usr/lib/sysusers.d" "$root/usr/lib/tmpfiles.d" "$root/etc"

# What systemd itself and libvirt bring. Where libvirt is not installed its sockets need stand-ins.
cp -a /usr/lib/systemd/system/. "$units/"
# Units of other packages may name programs that are not in the temporary root; they are not what is checked here.
find "$units" -name '*.service' ! -name 'systemd-*' -delete
for socket in libvirtd virtqemud virtlogd; do
    printf '[Unit]\nDescription=%s\n[Socket]\nListenStream=/run/%s\nService=stand-in.service\n' "$socket" "$socket" \
        >"$units/$socket.socket"
done
# The drop-in is for libvirt's service, of which there is no telling whether it is installed here.
printf '[Service]\nExecStart=/usr/bin/dalgu-agent\n' >"$units/stand-in.service"
install -D -m 644 libvirtd-dalgu.conf "$units/stand-in.service.d/dalgu.conf"
for program in dalgu-controller dalgu-agent; do
    printf '#!/bin/sh\n' >"$root/usr/bin/$program"
    chmod 755 "$root/usr/bin/$program"
done
cp dalgu-controller.service dalgu-agent.service "$units/"
cp dalgu.sysusers "$root/usr/lib/sysusers.d/dalgu.conf"
cp dalgu.tmpfiles "$root/usr/lib/tmpfiles.d/dalgu.conf"
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"

failed=0
for unit in dalgu-controller.service dalgu-agent.service stand-in.service; do
    # --man=no: the manual is not installed either.
    remarks=$(systemd-analyze verify --man=no --recursive-errors=no --root="$root" "$units/$unit" 2>&1) || failed=1
    if [ -n "$remarks" ]; then
        echo "$unit: systemd-analyze verify says:" >&2
        printf '%s\n' "$remarks" >&2
        failed=1
    else
        echo "$unit: verified"
    fi
done

rate() { # unit, limit
    if rating=$(systemd-analyze security --offline=true --root="$root" --threshold="$2" --no-pager "$1" 2>&1); then
        printf '%s\n' "$rating" | tail -n 1
    else
        printf '%s\n' "$rating" >&2
        echo "$1: more exposed than $2 tenths" >&2
        failed=1
    fi
}
rate dalgu-controller.service "$limit_controller"
rate dalgu-agent.service "$limit_agent"

said=$(systemd-sysusers --root="$root" dalgu.conf 2>&1) || { printf '%s\n' "$said" >&2; failed=1; }
for user in dalgu dalgu-image; do
    grep -q "^$user:" "$root/etc/passwd" || { echo "dalgu.sysusers made no user $user" >&2; failed=1; }
done
systemd-tmpfiles --root="$root" --create dalgu.conf || failed=1
mode=$(stat -c %a "$root/var/lib/dalgu/controller")
[ "$mode" = 700 ] || { echo "the controller's directory has mode $mode" >&2; failed=1; }
[ "$failed" = 0 ] && echo "user and directories: made as described"
exit "$failed"
