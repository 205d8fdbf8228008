#!/usr/bin/env bash
# Runs every check and every test, goes on after a failure, and ends with a summary of what ran.
# Called by `make test` and by CI. The set-up step must have run.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1

# Where an error was made says less than its words, and takes a hundred lines; panics still tell where they were.
export RUST_LIB_BACKTRACE=0
# Only the end-to-end tests need root; cargo itself stays the caller's.
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo "--preserve-env=DALGU_TEST_LAB_ID,NEXTEST_TEST_GROUP_SLOT,RUST_BACKTRACE,RUST_LIB_BACKTRACE")

work=$(mktemp -d)
leave() {
    rm -rf "$work"
    # Tests that were interrupted may have left their labs.
    local lab=${CARGO_TARGET_DIR:-target}/debug/lab last=${DALGU_TEST_LAB_ID:-9} id
    [ -x "$lab" ] || return
    for id in "$last" $((last - 1)) $((last - 2)); do "${as_root[@]}" "$lab" --id "$id" down; done
}
trap leave EXIT
summary=()
failed_steps=0
passed=0
failed=0
step_skipped=0

# Adds up the closing lines of nextest and of cargo test.
count() {
    local numbers
    numbers=$(sed 's/\x1b\[[0-9;]*m//g' "$1" | awk '
        function before(word,   i) { for (i = 2; i <= NF; i++) if ($i ~ "^" word "[,;:]?$") return $(i - 1); return 0 }
        /^ +Summary \[/ { p += before("passed"); f += before("failed") + before("timed"); s += before("skipped") }
        /^test result:/ { p += before("passed"); f += before("failed"); s += before("ignored") }
        END { print p + 0, f + 0, s + 0 }')
    read -r step_passed step_failed step_skipped <<<"$numbers"
    passed=$((passed + step_passed))
    failed=$((failed + step_failed))
}

# step NAME KIND COMMAND...: KIND is check, or tests where the output ends with a count.
step() {
    local name=$1 kind=$2 began=$SECONDS verdict detail=
    shift 2
    printf '\n== %s\n' "$name"
    if "$@" 2>&1 | tee "$work/out"; then verdict=ok; else verdict=FAILED; failed_steps=$((failed_steps + 1)); fi
    if [ "$kind" = tests ]; then
        count "$work/out"
        detail="$step_passed passed, $step_failed failed"
    fi
    summary+=("$(printf '%-24s %-7s %4d s  %s' "$name" "$verdict" $((SECONDS - began)) "$detail")")
}

scripts() {
    local script status=0
    for script in tests/lab/setup.sh tests/lab/guest/build.sh tests/lab/guest/init tests/lab/image/build.sh tests/run.sh .ci/run systemd/check.sh systemd/deb/build.sh systemd/deb/check.sh \
        tests/fuzz/run.sh tests/fuzz/rustc-coverage.sh; do
        bash -n "$script" || status=1
    done
    return $status
}

end_to_end() {
    local wanted='not binary(debian)'
    if [ "${#as_root[@]}" -gt 0 ]; then export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="${as_root[*]}"; fi
    if ! "${as_root[@]}" "${CARGO_TARGET_DIR:-target}/debug/lab" can-load; then
        printf 'IGNORED on this machine: what needs hosts with a load of their own\n'
        wanted+=' & not test(a_host_under_real_pressure)'
    fi
    # Of the whole workspace, as the first run, so that nothing is built anew.
    # Whole systems boot for minutes: `make tour-image` has them.
    cargo nextest run --profile ci --workspace --run-ignored only --test-threads 3 -E "$wanted"
}

step "scripts" check scripts
step "systemd units" check systemd/check.sh
step "format" check cargo fmt --all --check
step "build" check cargo build --workspace --all-targets
step "lints" check cargo clippy --quiet --workspace --all-targets -- --deny warnings
step "dependencies" check cargo deny --locked --log-level error check bans licenses sources
step "unit and cluster tests" tests cargo nextest run --profile ci --workspace
unit_left_out=$step_skipped
step "documentation tests" tests cargo test --quiet --workspace --doc
step "fuzzing, 4 s a target" check tests/fuzz/run.sh 4
step "end-to-end tests" tests end_to_end
# The first run leaves out the tests marked as ignored; what the last one did not run is skipped indeed.
skipped=$((unit_left_out - step_passed - step_failed))
[ "$skipped" -ge 0 ] || skipped=0

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
printf '\n%d of %d steps failed\n' "$failed_steps" "${#summary[@]}"
printf 'tests: %d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed_steps" -eq 0 ] && [ "$passed" -gt 0 ]
