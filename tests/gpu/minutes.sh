#!/usr/bin/env bash
# Asks a bare machine with one GPU, within nine minutes, what only a GPU can answer. Run it in the repository's root:
#
#   OUT=EMPTY_FOLDER [WHEELS=FOLDER] bash tests/gpu/minutes.sh
#
# WHEELS holds the packages that the machine lacks; they are installed outside the repository, without a network. Each
# part has a limit of its own, and what it printed is kept whatever fails. DRY=1 runs every part on a machine without a
# GPU: smaller models, CPU ranks, fake tensors. It shows that the script works, and nothing about a GPU.
set -uo pipefail
: "${OUT:?set OUT to an empty folder for the results}"
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
export PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
TIMES=$((${DRY:+4} + 1)) # a dry run may take place on a busy machine
END=$((SECONDS + 540 * TIMES))
mkdir -p "$OUT"

say() { echo "== $((SECONDS)) s: $*" | tee -a "$OUT/log.txt"; }

# part NAME LIMIT_S FILE COMMAND...: runs a command for at most LIMIT_S seconds; its output is appended to FILE.
part() {
	local name=$1 limit_s=$(($2 * TIMES)) file=$3 code=0
	shift 3
	((limit_s > END - SECONDS)) && limit_s=$((END - SECONDS))
	((limit_s > 0)) || { say "$name: no time is left"; return 1; }
	say "$name, at most $limit_s s"
	timeout --kill-after=15 "$limit_s" "$@" >>"$OUT/$file" 2>&1 || code=$?
	((code == 0)) || say "$name: exit code $code"
	return "$code"
}

sweep_file() { # sweep_file NAME: writes a sweep with an out-of-memory boundary inside.
	cat >"$WORK/$1.yaml" <<-YAML
		name: $1
		workload: {model: $MODEL, seq_length: $SEQ_LENGTH, global_batch_size: 16, precision: $PRECISION}
		cluster: detect
		baseline: {micro_batch_size: 1, recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}
		knobs:
		  micro_batch_size: [1, 2, 4, 8, 16]
		  recompute_granularity: [none, selective, full]
		  recompute_method: [none, uniform]
		  recompute_num_layers: [0, 1, 4]
		$EXTRA_KNOBS
		budget: {trials: 14, finalists: 0, canary_every: null, min_gain: null}
		measurement: {min_steps: 3, max_steps: 5}
	YAML
	echo "$WORK/$1.yaml"
}

if [[ ${DRY:-} ]]; then
	MODEL=tiny-gpt SEQ_LENGTH=64 PRECISION=fp32 EXTRA_KNOBS=""
else
	MODEL=qwen3-0.6b SEQ_LENGTH=4096 PRECISION=bf16 EXTRA_KNOBS="  expandable_segments: [false, true]"
fi
if [[ ${WHEELS:-} ]]; then
	$PYTHON -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" \
		"$WHEELS"/*.whl || exit 1
	PYTHONPATH=$PWD:$WORK/site
fi

part facts 40 facts.txt bash -c "nvidia-smi; nvidia-smi -q -d PERFORMANCE,CLOCK; $PYTHON -m pip list; $PYTHON -m tuner doctor"

HOW=()
part "does a fork reach the GPU" 75 sweep.txt $PYTHON -m tuner sweep "$(sweep_file first)" --results "$WORK/results" --max-trials 1
if ! grep -q '"completed"' "$WORK/results/first/trials/t0000/result.json"; then
	HOW=(--cold)
	say "forked trials fail: $(head -c 400 "$WORK/results/first/trials/t0000/result.json")"
fi
part tests/gpu 110 tests.txt $PYTHON -m pytest tests/gpu -q -p no:cacheprovider
part "sweep ${HOW[*]-}" 150 sweep.txt $PYTHON -m tuner sweep "$(sweep_file one-gpu)" --results "$WORK/results" "${HOW[@]}"
part "cold trials" 70 sweep.txt $PYTHON -m tuner sweep "$(sweep_file cold)" --results "$WORK/results" --cold --max-trials 3
part calibration 50 calibration.txt $PYTHON -m tuner calibrate
part "predicted times" 15 calibration.txt $PYTHON -m tuner plan "$WORK/one-gpu.yaml" --json
part "predicted and measured memory" $(((END - SECONDS - 15) / TIMES)) memory.jsonl $PYTHON -m tests.gpu.memory
say "end"
tar --create --gzip --file "$OUT/results.tgz" --exclude='*.lock' --directory "$WORK" results
rm -rf "$WORK"
tail -n 30 "$OUT/sweep.txt"
