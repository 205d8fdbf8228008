#!/usr/bin/env bash
# Makes the packages dalgu, dalgu-controller and dalgu-agent from target/release, and has lintian judge them: an error there is one here.
# Called by `make deb`.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

target=${CARGO_TARGET_DIR:-$PWD/target}
release=$target/release
# What the packages' assets name; beside the sources, wherever the build is.
made=target/deb
mkdir -p "$made" "$target/debian"
rm -f "$target"/debian/*.deb

version=$("$release/dalgu" version --output name)

# manual PROGRAM SECTION SENTENCE
manual() {
    help2man --no-info --section "$2" --name "$3" --version-string "Dalgu $version" --help-option=--help "$release/$1" >"$made/$1.$2"
}
manual dalgu 1 'virtual machines of a site, from anywhere'
manual dalgu-controller 8 'what should run where on a site'
manual dalgu-agent 8 "runs a host's virtual machines"

for shell in bash zsh fish; do
    "$release/dalgu" completion "$shell" >"$made/dalgu.$shell"
done

for package in dalgu-controller dalgu-agent; do
    for kind in sysusers tmpfiles; do cp "systemd/dalgu.$kind" "$made/$package.$kind"; done
done

for package in dalgu dalgu-controller dalgu-agent; do
    cat >"$made/$package.changelog" <<END
$package ($version-1) stable; urgency=medium

  * Version $version. What is new: CHANGELOG.md of the sources.

 -- Dalgu <dalgu@dalgu.example>  $(LC_ALL=C date -u -d "@$(git log -1 --format=%ct 2>/dev/null || date +%s)" '+%a, %d %b %Y %H:%M:%S +0000')
END
    cargo deb --quiet --no-build --package "$package" --output "$target/debian"
done

ls -l "$target"/debian/*.deb
lintian --fail-on error --info "$target"/debian/*.deb
