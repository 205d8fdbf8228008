#!/usr/bin/env bash
# Fuzzes. Called by `make fuzz` and, for some seconds, by tests/run.sh.
#   run.sh SECONDS [TARGET...]     each target for so long; all of them where none is named
# Environment: KEEP=1 minimises what was found and keeps it in tests/fuzz/corpus (to be committed).
# Compiled with the stable toolchain: -Cpasses and -Cllvm-args reach LLVM's coverage pass, libfuzzer-sys brings libFuzzer, and a
# C++ compiler is all that is needed besides.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 1

[ $# -ge 1 ] || { echo "usage: tests/fuzz/run.sh SECONDS [TARGET...]" >&2; exit 2; }
seconds=$1
shift
work=${CARGO_TARGET_DIR:-$PWD/target}/fuzz-work
bin=${CARGO_TARGET_DIR:-$PWD/target}/debug

# Only the workspace's own crates are compiled anew, beside the ordinary ones.
RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/rustc-coverage.sh \
    cargo build --quiet --package dalgu-fuzz --features libfuzzer --bin fuzz || exit 1
mkdir -p "$work"
# The next build has other flags and may put its program in the same place.
cp "$bin/fuzz" "$work/fuzz" || exit 1
cargo build --quiet --package dalgu-fuzz --bin inputs || exit 1

targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <("$bin/inputs" list)
failed=0
summary=()

# The number after NAME in a log of libFuzzer; 0 where there is none.
number() { sed -n "s/.*$1[: ]*\([0-9][0-9]*\).*/\1/p" "$2" | tail -n 1 | grep . || echo 0; }

for target in "${targets[@]}"; do
    dir=$work/$target
    rm -rf "$dir/corpus"
    mkdir -p "$dir/corpus" "$dir/crashes"
    "$bin/inputs" unpack "$target" "$dir/corpus" || exit 1
    known=$(find "$dir/corpus" -type f | wc -l)
    printf '== %s: %s s, %s inputs known\n' "$target" "$seconds" "$known"
    if DALGU_FUZZ_TARGET=$target "$work/fuzz" "$dir/corpus" -max_total_time="$seconds" -max_len=4096 -timeout=10 \
        -rss_limit_mb=2048 -use_value_profile=0 -print_final_stats=1 -artifact_prefix="$dir/crashes/" >"$dir/log" 2>&1; then
        verdict=ok
    else
        verdict=CRASH
        failed=1
        tail -n 40 "$dir/log"
        input=$(sed -n 's/.*Test unit written to //p' "$dir/log" | tail -n 1)
        echo
        echo "to see it again: cargo run -p dalgu-fuzz --bin inputs -- replay $target $input"
        echo "when it is mended: keep the input in tests/fuzz/seeds/$target/ under a name that says what went wrong"
    fi
    summary+=("$(printf '%-10s %-6s %10s executions %7s a second, %6s edges, %5s inputs, %s MiB' "$target" "$verdict" \
        "$(number number_of_executed_units "$dir/log")" "$(number average_exec_per_sec "$dir/log")" \
        "$(number 'cov' "$dir/log")" "$(find "$dir/corpus" -type f | wc -l)" "$(number peak_rss_mb "$dir/log")")")
    if [ "${KEEP:-}" = 1 ] && [ "$verdict" = ok ]; then
        rm -rf "$dir/least"
        mkdir -p "$dir/least"
        DALGU_FUZZ_TARGET=$target "$work/fuzz" -merge=1 -max_len=4096 "$dir/least" "$dir/corpus" >"$dir/merge.log" 2>&1 || failed=1
        "$bin/inputs" pack "$target" "$dir/least" || failed=1
    fi
done
printf '\n== fuzzing\n'
printf '%s\n' "${summary[@]}"
exit $failed
