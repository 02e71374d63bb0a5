#!/usr/bin/env bash
# The whole pipeline at the toy preset, through the command line. Resumable: the same command goes on where it stopped.
#   bash runs/toy.sh            the shipped models: fine-tune with each feedback, evaluate, draw views of a picture
#   bash runs/toy.sh --small    the same in a minute or two, on numbers too small to mean anything (used by the tests)
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = "--small" ]; then
    out=out/toy_small
    scorer="--num_objects 4 --num_val 4 --steps 6 --eval_every 6 --num_steps 4"
    d3po="--num_objects 3 --eval_objects 4 --steps 3 --eval_every 3 --num_steps 6 --first_call 2"
    feedbacks="contrastive hull"
    sft="--num_objects 8 --eval_objects 4 --steps 3 --eval_every 3 --num_steps 4 --batch_size 2"
    n=4
else
    out=out
    scorer="" d3po="" feedbacks="contrastive matching hull" n=64
    sft="--init checkpoints/toy --attention_only --split preference --num_objects 48 --steps 150 --eval_every 150 --lr 5e-5"
fi

# Stage 1: the SFT baseline (with --small: pre-training from nothing)
python train_sft.py $sft --out $out/sft

# Stage 2: the contrastive scorer
python train_scorer.py $scorer --out $out/scorer

# Stage 3: MV-D3PO, once for each feedback, on the same candidates
for feedback in $feedbacks; do
    python train_d3po.py --feedback $feedback --scorer $out/scorer $d3po --out $out
done

# Evaluation on validation objects, and views of a picture of one's own
python evaluate.py --model $out/d3po_contrastive --split validation --n $n --scorer $out/scorer --out $out/table.json
python data.py --toys 1 --seed 2 --size 64 --out $out/example
python sample.py --image "$(ls -d $out/example/*/ | head -n 1)front.png" --model $out/d3po_contrastive --out $out/views.png
