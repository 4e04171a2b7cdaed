#!/bin/sh
# sh measure.sh [BENCHMARK_MODEL [ROUNDS]]: times the models of this folder by TensorFlow Lite's own benchmark_model, on
# a phone or board without Python. Every model once a round, in an order of its own each round; a model that fails is
# noted, and the others go on. All that the tool says goes to benchmark_model.log, where `nas measure --import` reads it.
# Cut off, the same command goes on with the first round that is not complete.
#
#   BENCHMARK_MODEL  the tool; not given: a file of this folder whose name ends so
#   ROUNDS           as many as `nas measure --bundle` wrote into calls.txt, if not given
#   CPUS=80          (environment) mask of the CPUs to run on, in hexadecimal as `taskset` takes it: 80 is CPU 7 alone
#   JSON=1           (environment) progress as lines of JSON, for `nas measure --over`
#
# For mksh (Android), dash, and busybox's sh, whose numbers may have 32 bits.
set -u

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

log=benchmark_model.log lock=benchmark_model.running from=$PWD
cd "$(dirname "$0")" || exit 2
[ -r calls.txt ] || die "$PWD/calls.txt is missing: copy the whole bundle again."

digest='' threads='' rounds='' hang='' count=0
while read -r what first second third; do
    case $what in
        digest) digest=$first ;;
        threads) threads=$first ;;
        rounds) rounds=$first ;;
        hang) hang=$first ;;
        call)
            eval "file_$first=\$second shape_$first=\$third failed_$first=0"
            [ -r "$second" ] || die "$PWD/$second is missing: copy the whole bundle again."
            count=$((count + 1))
            ;;
    esac
done < calls.txt
rounds=${2:-$rounds}
case $rounds in
    '' | *[!0-9]* | 0*) die "ROUNDS is $rounds: a number of 1 or more is needed." ;;
esac

tool=${1:-}
if [ -z "$tool" ]; then
    for tool in "$PWD"/*benchmark_model; do break; done
fi
case $tool in
    /*) ;;
    *) tool=$from/$tool ;;
esac
[ -f "$tool" ] || die "there is no $tool. Download TensorFlow Lite's benchmark_model for this system (README.txt), and \
run: sh measure.sh path/to/benchmark_model"
[ -x "$tool" ] || die "$tool is not executable here: chmod +x it; on Android only below /data/local/tmp."

pin=''
if [ -n "${CPUS:-}" ]; then
    pin="taskset $CPUS"
    $pin true || die "\`$pin\` does not work here: give the mask of CPUs that this process may use, or no CPUS."
fi
limit=''
case $(timeout --help 2>&1) in
    *[Tt]oybox*) ;; # its exit status is now and then 127, whatever ran (0.8.9): a tool that hangs must be ended by hand
    *) timeout 5 true 2> /dev/null && limit="timeout $hang" ;;
esac
# XNNPACK, as the interpreter that nas runs here has it; as long as a phone's clock takes to rise, then as long again.
flags="--num_threads=$threads --use_xnnpack=true --warmup_runs=1 --warmup_min_secs=0.1"
flags="$flags --num_runs=5 --min_secs=0.1 --max_secs=10"

# What is measured: a phone's name from its properties, a board's from its device tree, a server's from its CPU.
hardware() {
    name=''
    if command -v getprop > /dev/null 2>&1; then
        name="$(getprop ro.product.manufacturer) $(getprop ro.product.model) $(getprop ro.soc.model)"
    elif [ -r /proc/device-tree/model ]; then
        name=$(tr -d '\000' < /proc/device-tree/model)
    elif [ -r /proc/cpuinfo ]; then
        name=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)
    fi
    set -- /sys/devices/system/cpu/cpu[0-9]*
    cpus=$#
    # shellcheck disable=SC2086  # words, with one space between them
    set -f && set -- $name && set +f
    name="$*"
    printf '%s, %s, %s cores' "${name:-unknown}" "$(uname -m)" "$cpus"
}

sum=$(cksum < "$tool") || die "$tool cannot be read."
with="tool=${sum%% *} threads=$threads cpus=${CPUS:-any} flags=$flags"
is=$(hardware)

if ! (set -C && echo $$ > "$lock") 2> /dev/null; then
    other=$(cat "$lock")
    if [ -n "$other" ] && kill -0 "$other" 2> /dev/null; then
        die "this bundle is being measured already, by process $other. Wait for it or end it; remove $PWD/$lock if it \
is another program's number."
    fi
    echo $$ > "$lock"
fi
trap 'rm -f "$lock"' EXIT
trap 'printf "interrupted: complete rounds are kept, and the same command goes on\n" >&2; exit 130' INT TERM HUP

# Refuses to go on if what the log says about $1 is not $2.
same() {
    before=$(grep "^@ $1 " "$log" | head -n 1)
    [ "$before" = "@ $1 $2" ] || die "what was timed so far is \`${before#@ }\`, and now it would be \`$1 $2\`: that \
cannot be continued. Do as before, or move $PWD/$log away."
}

# The last record may have been cut off anywhere; rounds before it were complete.
complete=0
if [ -f "$log" ] && grep -q '^@ done [0-9]* [0-9]' "$log"; then
    grep -q "^@ nas benchmark_model 1 $digest\$" "$log" ||
        die "$PWD/$log is of another bundle. Move it away, and run the same command."
    same with "$with"
    same hardware "$is"
    complete=$(grep '^@ done [0-9]* [0-9]' "$log" | tail -n 1)
    complete=${complete#@ done }
    complete=${complete%% *}
    if [ "$complete" -ge "$rounds" ] && [ "$(tail -n 1 "$log")" = "@ end" ]; then
        printf 'done already: %s rounds in %s\n' "$complete" "$PWD/$log"
        exit 0
    fi
else
    printf '@ nas benchmark_model 1 %s\n' "$digest" > "$log" || die "$PWD cannot be written to."
fi

# Runs the model of call $1; sets `status`. What the tool says goes to stdout.
run() {
    eval "file=\$file_$1 shape=\$shape_$1"
    case $shape in
        1,*) shape='' ;;
        *) shape="--input_layer=images --input_layer_shape=$shape" ;;
    esac
    # shellcheck disable=SC2086  # they are words, or nothing
    $pin $limit "$tool" --graph="$file" $flags $shape 2>&1
    status=$?
}

# A tool that cannot run here, or that is another, is told now and not after hours.
said=$(run 0; exit "$status")
status=$?
case $said in
    *'Inference timings in us: '*) ;;
    *)
        case $status in
            0 | 126 | 127)
                die "$tool is not a benchmark_model that runs here (exit status $status): it did not say \`Inference \
timings in us\` but: $(printf '%s' "$said" | tail -n 1). Download the one for this system (README.txt)."
                ;;
        esac
        ;;
esac

printf '\n@ start %s\n@ with %s\n@ hardware %s\n@ load %s\n' "$(date +%s)" "$with" "$is" \
    "$(cut -d ' ' -f 1 /proc/loadavg 2> /dev/null)" >> "$log"

# Progress: model `at` of the round that follows the `complete` ones.
began=$(date +%s) first_of_all=$((complete * count)) failures=0
tell() {
    all=$((rounds * count)) made=$((complete * count + at))
    elapsed=$(($(date +%s) - began))
    left=0
    [ "$made" -gt "$first_of_all" ] && left=$(((all - made) * elapsed / (made - first_of_all)))
    thousandth=$((1000 * made / all))
    more="round $((complete + 1)) of $rounds, model $at of $count; $failures failed"
    if [ -n "${JSON:-}" ]; then
        printf '{"what": "timing", "share": %d.%03d, "seconds_left": %d, "more": "%s"}\n' \
            $((thousandth / 1000)) $((thousandth % 1000)) "$left" "$more"
    else
        printf '%3d %%  %d s left  %s\n' $((thousandth / 10)) "$left" "$more"
    fi
}

while [ "$complete" -lt "$rounds" ]; do
    round=$((complete + 1)) at=0 start=$(date +%s)
    printf '@ round %s\n' "$round" >> "$log"
    # Steps of a width without a common factor with their number pass all models, each round in another order.
    width=$((1 + round * 7919 % count))
    while :; do
        a=$width b=$count
        while [ "$b" -gt 0 ]; do
            c=$((a % b)) a=$b b=$c
        done
        [ "$a" -eq 1 ] && break
        width=$((width + 1))
    done
    while [ "$at" -lt "$count" ]; do
        call=$(((round * 127 + at * width) % count))
        at=$((at + 1))
        eval "failed=\$failed_$call"
        [ "$failed" -ge 2 ] && continue
        printf '@ run %s\n' "$call" >> "$log"
        run "$call" >> "$log"
        printf '\n@ ended %s %s\n' "$call" "$status" >> "$log" || die "$PWD/$log cannot be written to: is there space?"
        case $status in
            0) ;;
            126 | 127) die "$tool cannot be run any more (exit status $status); complete rounds are kept." ;;
            *)
                eval "failed_$call=$((failed + 1))"
                failures=$((failures + 1))
                ;;
        esac
        [ $((at % 10)) -eq 0 ] && tell
    done
    printf '@ done %s %s\n' "$round" $(($(date +%s) - start)) >> "$log"
    tell
    [ "$failures" -lt $((count * (round - first_of_all / count))) ] ||
        die "no model has run with $tool: the end of $PWD/$log has what it said."
    complete=$round
done
printf '@ end\n' >> "$log"
[ -n "${JSON:-}" ] || printf 'done: %s. Bring it back beside the bundle, and: nas measure --import BUNDLE --as NAME\n' \
    "$PWD/$log"
