#!/usr/bin/env bash
# Sets everything up and runs the main job: a real instruction-tuned MoE, its experts on the CPU, one question answered.
#
# Usage: scripts/quickstart.sh [options]
#   --method M      AMXINT8 (default), AMXINT4 or BF16: how the experts are stored and computed
#   --prompt TEXT   the question (default: Tell me about the capital of France in one sentence.)
#   --port N        port of the server (default: 30000, or the next free one)
#   --keep          leave the server running
#   --skip-install  use the environment as it is
#   --help          this text
#
# The model and its converted experts are made once, in .demo (KT_DEMO_DIR chooses another folder): about 2.2 GB.
# Uses the active virtual environment, else .venv in the clone, like install.sh.
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
demo=${KT_DEMO_DIR:-$repo/.demo}
method=AMXINT8 prompt='Tell me about the capital of France in one sentence.' port='' keep=0 skip_install=0
served_name=smollm2-moe
started=$SECONDS

say() { printf 'quickstart: %s\n' "$*"; }
fail() {
  printf 'quickstart: error: %s\n' "$*" >&2
  exit 1
}

usage() { sed -n '2,/^set -E/{/^set -E/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
  case $1 in
    --method | --prompt | --port)
      (($# >= 2)) || fail "$1 needs a value; scripts/quickstart.sh --help lists the options"
      declare "${1#--}=$2"
      shift
      ;;
    --keep) keep=1 ;;
    --skip-install) skip_install=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown option $1; scripts/quickstart.sh --help lists the options" ;;
  esac
  shift
done
case $method in
  AMXINT8) quant=int8 ;;
  AMXINT4) quant=int4 ;;
  BF16) quant='' ;;
  *) fail "--method is $method; it must be AMXINT8, AMXINT4 or BF16" ;;
esac
[[ -z $port || $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "--port is $port; it must be a number from 1 to 65535"

# The environment install.sh uses.
environment_python() {
  if [[ -n ${VIRTUAL_ENV:-} ]]; then
    echo "$VIRTUAL_ENV/bin/python"
  elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    echo "$CONDA_PREFIX/bin/python"
  else
    echo "$repo/.venv/bin/python"
  fi
}

server=''
stop_server() {
  [[ -n $server ]] || return 0
  # the main process ends the others in order; a signal to all would look like a crash to it
  kill -TERM "$server" 2>/dev/null || true
  say "stopping the server"
  # an orderly end takes 5 s; while SGLang starts its processes it may take no notice of the signal
  for _ in {1..100}; do
    kill -0 -- "-$server" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL -- "-$server" 2>/dev/null || true
  server=''
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# before minutes of work; the client needs nothing but Python's own library
if [[ -n $port ]]; then python3 "$repo/scripts/quickstart_client.py" port --port "$port" >/dev/null || exit 1; fi
((skip_install)) || "$repo/install.sh" --demo
python=$(environment_python)
[[ -x $python ]] || fail "there is no environment at $python; run scripts/quickstart.sh without --skip-install"
cd "$repo"
mkdir -p "$demo"
demo=$(cd "$demo" && pwd)
client=$repo/scripts/quickstart_client.py

model=$demo/model
if [[ -f $model/config.json ]]; then
  say "demo model: $model is there"
else
  say "demo model: making $model (SmolLM2-135M-Instruct, upcycled to 8 experts a layer), about a minute"
  "$python" -m kt_kernel.demo --output "$model" 2>"$demo/model.log" || {
    tail -n 15 "$demo/model.log" >&2
    fail "the demo model could not be made; the reason is above (full log: $demo/model.log)"
  }
  tail -n 1 "$demo/model.log"
fi

weights=$model
if [[ -n $quant ]]; then
  weights=$demo/experts-$quant
  # complete folders are recognized at once, interrupted ones are finished
  say "experts: converting to $method in $weights"
  "$python" scripts/convert_cpu_weights.py --input-path "$model" --input-type bf16 --output "$weights" \
    --quant-method "$quant" || fail "the conversion failed; the reason is above, and the same command goes on where it stopped"
fi

port=$("$python" "$client" port ${port:+--port "$port"}) || exit 1
log=$demo/server.log
say "server: starting on port $port, log in $log"
# a session of its own: Ctrl-C reaches this script, which then stops the server and all its processes
setsid "$python" -m kt_kernel.launch_server --model-path "$model" --served-model-name "$served_name" \
  --host 127.0.0.1 --port "$port" --kt-method "$method" --kt-weight-path "$weights" --max-running-requests 16 \
  >"$log" 2>&1 </dev/null &
server=$!
disown "$server" # bash is not to report how it ended
"$python" "$client" wait --port "$port" --pid "$server" --log "$log" ||
  fail "the server did not start; the end of its log is above (full log: $log)"

"$python" "$client" ask --port "$port" --model "$served_name" --prompt "$prompt" || fail "the question was not answered; see $log"

proof=$(grep -o 'kt_kernel active: .*' "$log" | head -n 1) ||
  fail "the server answered, but its log has no line 'kt_kernel active': no expert ran on the CPU; see $log"
printf '\n%s\n' "$proof"
say "done in $((SECONDS - started)) s"
question='{"model": "'$served_name'", "messages": [{"role": "user", "content": "Name three colors."}]}'
printf '\nAsk it something else:\n'
if ((keep)); then
  printf "  curl -s http://127.0.0.1:%s/v1/chat/completions -H 'Content-Type: application/json' -d '%s'\n" "$port" "$question"
  printf 'The server goes on running; stop it with:\n  kill -- -%s\n' "$server"
  server=''
else
  printf '  scripts/quickstart.sh --prompt "Name three colors."\n'
  printf 'or keep the server running (--keep) and use:\n'
  printf "  curl -s http://127.0.0.1:%s/v1/chat/completions -H 'Content-Type: application/json' -d '%s'\n" "$port" "$question"
fi
