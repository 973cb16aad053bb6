#!/usr/bin/env bash
# Two "nodes" on one machine: two torchrun agents, one rendezvous. Kill one, then give the same commands again.
#   bash experiments/two_nodes.sh OUT [flags of train.py]
set -u
out=$1
shift
mkdir -p "$out"
node() {  # number of the node, flags of train.py. Node 0 hosts the store, so that it outlives node 1.
    OMP_NUM_THREADS=1 exec python -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_id nodes \
        --rdzv_backend c10d --rdzv_endpoint localhost:29571 --rdzv_conf "is_host=$((1 - $1))" \
        --local_addr localhost \
        train.py --arch vit_tiny --data shapes:512 --epochs 6 --workers 0 --out "$out/run" "${@:2}" \
        >> "$out/node$1.log" 2>&1
}
epochs() { cat "$out/run/log.jsonl" 2> /dev/null | grep -c '"event": "epoch"'; }

node 0 "$@" & first=$!
node 1 "$@" & second=$!
until [ "$(epochs)" -ge 3 ]; do kill -0 $first || exit 1; sleep 0.2; done
echo "after 3 epochs: node 1's agent is killed (SIGKILL)"
kill -9 $second
wait $second 2> /dev/null
wait $first
echo "node 0 ended with code $?, after $(epochs) epochs; the same commands again"
node 0 "$@" & first=$!
node 1 "$@" & second=$!
wait $first && wait $second
echo "ended with code $?, after $(epochs) epochs"
grep -h -E "^epoch|from epoch|lost|stopped|balanced|saved" "$out"/node?.log
