#!/usr/bin/env bash
# Every script once through the real command line, on numbers too small to mean anything: does it all fit?
# .ci/run uses it. A minute and a half of one core; the same command reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/small}

# Stage 1: pre-training from nothing. Stage 2: the contrastive scorer
python train_sft.py --data furniture toys --num_objects 8 --eval_objects 2 --steps 3 \
    --batch_size 2 --num_steps 3 --out $out/sft
python train_scorer.py --num_references 4 --num_val 2 --steps 4 --batch_size 4 --eval_every 4 --num_steps 3 \
    --out $out/scorer

# Stage 3: MV-D3PO with each kind of feedback, loss and candidates
d3po="--num_references 4 --eval_objects 4 --steps 2 --batch_objects 2 --num_steps 4 --trained_calls 0 1"
d3po="$d3po --scorer $out/scorer --out $out"
python train_d3po.py --feedback contrastive $d3po
python train_d3po.py --feedback agreement --loss diffusion_dpo --num_candidates 3 $d3po
python train_d3po.py --feedback geometry --candidates noised $d3po
python train_d3po.py --feedback none $d3po

# What is there to gain, how good is it, and views of a picture of one's own
python -m runs.headroom --scorer $out/scorer --n 2 --num_candidates 2 --num_steps 3 --branch_calls 0 \
    --out $out/headroom
python evaluate.py --model $out/d3po_contrastive --n 2 --num_steps 3 --scorer $out/scorer \
    --out $out/table.json --grid $out/table.png
python data.py --toys 1 --seed 2 --size 64 --out $out/example
python sample.py --image "$(ls -d $out/example/*/ | head -n 1)front.png" --model $out/d3po_contrastive \
    --num_steps 3 --out $out/views.png
python theory.py > $out/theory.txt
tail -n 2 $out/theory.txt
test -s $out/d3po_contrastive/report/results.json
