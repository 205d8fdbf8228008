#!/bin/sh
# Stands in for rustc when cargo compiles the workspace's own crates for fuzzing (RUSTC_WORKSPACE_WRAPPER): adds what libFuzzer
# needs to see which code an input reaches. It is LLVM's own pass, in the stable toolchain too. Called by run.sh; third-party
# crates are compiled as always and shared with the ordinary build.
rustc=$1
shift
case " $* " in
    *' --crate-name build_script_build '* | *' --crate-name ___ '* | *' -vV '*) exec "$rustc" "$@" ;;
esac
exec "$rustc" "$@" \
    -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
