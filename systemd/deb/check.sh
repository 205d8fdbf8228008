#!/usr/bin/env bash
# Installs the packages of target/debian into a new root of this machine's release, as on a server that has nothing yet, and again as an upgrade, and
# removes them. Needs root and the distribution's mirror. Called by `make deb-check`; nothing is started: no systemd runs there.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

target=${CARGO_TARGET_DIR:-$PWD/target}
root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
fail() { printf 'check: %s\n' "$*" >&2; exit 1; }

compgen -G "$target/debian/dalgu-agent_*.deb" >/dev/null || fail "no packages: run make deb"
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
echo "check: a new root of $codename"
mmdebstrap --quiet --mode=root --variant=apt --include=ca-certificates "$codename" "$root"
# This machine's way to the mirror.
cp /etc/resolv.conf "$root/etc/"
cp /etc/apt/apt.conf.d/*proxy* "$root/etc/apt/apt.conf.d/" 2>/dev/null || true
mkdir "$root/debs"
cp "$target"/debian/*.deb "$root/debs/"
within() { chroot "$root" env DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }

# As administrators do it; what the packages need comes with them.
echo "check: installing"
within sh -c 'apt-get -q -y update && apt-get -q -y --no-install-recommends install /debs/*.deb' >"$root/log" 2>&1 || { cat "$root/log" >&2; fail "they cannot be installed"; }
for program in dalgu dalgu-controller dalgu-agent; do
    within "$program" --version
    within sh -c "zcat /usr/share/man/man?/$program.?.gz" | grep -q "^.TH" || fail "$program has no manual"
done
within getent passwd dalgu >/dev/null || fail "the controller has no user"
within getent passwd dalgu-image >/dev/null || fail "qemu-img has no user"
within systemctl is-enabled --quiet dalgu-controller.service dalgu-agent.service || fail "services do not start at boot"
# What systemd does at boot before all services.
systemd-tmpfiles --root="$root" --create dalgu-controller.conf dalgu-agent.conf
[ "$(within stat -c '%U %a' /var/lib/dalgu/controller)" = "dalgu 700" ] || fail "the controller's directory is not its own"
[ "$(within stat -c '%U %a' /etc/dalgu/tls)" = "root 700" ] || fail "keys could be read by others"

# The site of install.md.
within dalgu-controller init --data-dir /var/lib/dalgu/controller --site daegu --address controller.example >/dev/null 2>&1 || fail "no site can be made"
within dalgu-controller issue-agent --data-dir /var/lib/dalgu/controller --host server-1 --address server-1.example --out /root/server-1 >/dev/null 2>&1 ||
    fail "no host gets its identity"
within cp /usr/share/dalgu-controller/controller.toml /usr/share/dalgu-agent/agent.toml /etc/dalgu/
sum() { within sh -c 'sha256sum /etc/dalgu/*.toml /var/lib/dalgu/controller/*.pem'; }
before=$(sum)

echo "check: the same as an upgrade"
within sh -c 'dpkg --install /debs/*.deb' >"$root/log" 2>&1 || { cat "$root/log"; fail "no upgrade"; }
[ "$(sum)" = "$before" ] || fail "an upgrade changed what is the site's own"

echo "check: removing"
within apt-get -q -y purge dalgu dalgu-controller dalgu-agent >"$root/log" 2>&1 || { cat "$root/log"; fail "they cannot be removed"; }
[ "$(sum)" = "$before" ] || fail "removal took what is the site's own"
[ ! -e "$root/usr/bin/dalgu-agent" ] || fail "removal left programs"
echo "check: installed, upgraded and removed"
