#!/usr/bin/env bash
# Fuzzes. Called by `make fuzz` and, for some seconds, by tests/run.sh.
#   run.sh SECONDS [TARGET...]     each target for so long, as many at once as there are processors; all where none is named
# Environment: PROFILE, the cargo profile (dev is made soonest, fuzz runs fastest); KEEP=1 minimises what was found and keeps it in
# tests/fuzz/corpus (to be committed).
# Compiled with the stable toolchain: -Cpasses and -Cllvm-args reach LLVM's coverage pass, libfuzzer-sys brings libFuzzer, and a
# C++ compiler is all that is needed besides.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 1

[ $# -ge 1 ] || { echo "usage: tests/fuzz/run.sh SECONDS [TARGET...]" >&2; exit 2; }
seconds=$1
shift
profile=${PROFILE:-dev}
target_dir=${CARGO_TARGET_DIR:-$PWD/target}
work=$target_dir/fuzz-work
bin=$target_dir/$profile
[ "$profile" != dev ] || bin=$target_dir/debug
# A run shorter than this begins with a part of the known inputs (so many), or it would do nothing but run them all, as the replay
# tests do.
short=60
part=200

# Only the workspace's own crates are compiled anew, beside the ordinary ones.
RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/rustc-coverage.sh \
    cargo build --quiet --profile "$profile" --package dalgu-fuzz --features libfuzzer --bin fuzz || exit 1
mkdir -p "$work"
# The next build has other flags and may put its program in the same place; another run may have this one open.
cp --remove-destination "$bin/fuzz" "$work/fuzz" || exit 1
cargo build --quiet --profile "$profile" --package dalgu-fuzz --bin inputs || exit 1

targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <("$bin/inputs" list)

# The number after NAME in a log of libFuzzer; 0 where there is none.
number() { sed -n "s/.*$1[: ]*\([0-9][0-9]*\).*/\1/p" "$2" | tail -n 1 | grep . || echo 0; }

# Fuzzes one target; leaves its line of the summary in a file.
fuzz() {
    local target=$1 dir=$work/$1 verdict=ok input
    rm -rf "$dir/corpus" "$dir/summary"
    mkdir -p "$dir/corpus" "$dir/crashes"
    "$bin/inputs" unpack "$target" "$dir/corpus" || return 1
    if [ "$seconds" -lt "$short" ]; then
        find "$dir/corpus" -type f -print0 | shuf -z | tail -z -n "+$((part + 1))" | xargs -0 --no-run-if-empty rm
    fi
    printf '== %s: %s s, begun with %s inputs\n' "$target" "$seconds" "$(find "$dir/corpus" -type f | wc -l)"
    if ! DALGU_FUZZ_TARGET=$target "$work/fuzz" "$dir/corpus" -max_total_time="$seconds" -max_len=4096 -timeout=10 \
        -rss_limit_mb=2048 -use_value_profile=0 -print_final_stats=1 -artifact_prefix="$dir/crashes/" >"$dir/log" 2>&1; then
        verdict=CRASH
        tail -n 40 "$dir/log"
        input=$(sed -n 's/.*Test unit written to //p' "$dir/log" | tail -n 1)
        echo
        echo "to see it again: cargo run -p dalgu-fuzz --bin inputs -- replay $target $input"
        echo "when it is mended: keep the input in tests/fuzz/seeds/$target/ under a name that says what went wrong"
    elif [ "${KEEP:-}" = 1 ]; then
        rm -rf "$dir/least"
        mkdir -p "$dir/least"
        DALGU_FUZZ_TARGET=$target "$work/fuzz" -merge=1 -max_len=4096 "$dir/least" "$dir/corpus" >"$dir/merge.log" 2>&1 &&
            "$bin/inputs" pack "$target" "$dir/least" || verdict="NOT KEPT"
    fi
    printf '%-10s %-8s %10s executions %7s a second, %6s edges, %5s inputs, %s MiB\n' "$target" "$verdict" \
        "$(number number_of_executed_units "$dir/log")" "$(number average_exec_per_sec "$dir/log")" \
        "$(number 'cov' "$dir/log")" "$(find "$dir/corpus" -type f | wc -l)" "$(number peak_rss_mb "$dir/log")" >"$dir/summary"
    [ "$verdict" = ok ]
}
export work bin seconds short part KEEP
export -f fuzz number
printf '%s\0' "${targets[@]}" | xargs -0 -P "$(nproc)" -I '{}' bash -c 'set -uo pipefail; fuzz "$1"' bash '{}'
failed=$?
printf '\n== fuzzing\n'
for target in "${targets[@]}"; do
    cat "$work/$target/summary" || failed=1
done
exit "$failed"
