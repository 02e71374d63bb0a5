#!/usr/bin/env bash
# The whole pipeline at the toy preset, through the command line. Resumable: the same command goes on where it stopped.
#   bash runs/toy.sh            the shipped models: fine-tune with each feedback, evaluate, draw views of a picture
#   bash runs/toy.sh --small    the same in a minute or two, on numbers too small to mean anything (used by .ci/run)
set -euo pipefail
cd "$(dirname "$0")/.."

out=out/toy scorer="" d3po="" feedbacks="contrastive matching hull" n=64
if [ "${1:-}" = "--small" ]; then
    out=out/toy_small feedbacks="contrastive hull" n=4
    scorer="--num_objects 4 --num_val 4 --steps 6 --eval_every 6 --num_steps 4"
    d3po="--num_objects 3 --eval_objects 4 --steps 3 --num_steps 6 --first_call 2"
    # Stage 1, pre-training from nothing: an hour at full size, so only the small run does it
    python train_sft.py --num_objects 8 --eval_objects 4 --steps 3 --num_steps 4 --batch_size 2 --out $out/sft
fi

# Stage 2: the contrastive scorer
python train_scorer.py $scorer --out $out/scorer

# Stage 3: MV-D3PO, once for each feedback, on the same candidates. At beta 0 Eq. (2) has no gradient and what is left is
# L_simple-MV: the SFT baseline, with the same steps, objects, batches, learning rate and layers.
for feedback in $feedbacks; do
    python train_d3po.py --feedback $feedback --scorer $out/scorer $d3po --out $out
done
python train_d3po.py --beta_dpo 0 --name sft_baseline --scorer $out/scorer $d3po --out $out

# Evaluation on validation objects, and views of a picture of one's own
python evaluate.py --model $out/sft_baseline --n $n --scorer $out/scorer --out $out/sft_baseline.json
python evaluate.py --model $out/d3po_contrastive --n $n --scorer $out/scorer --out $out/table.json \
    --against $out/sft_baseline.json --grid $out/table.png
python data.py --toys 1 --seed 2 --size 64 --out $out/example
python sample.py --image "$(ls -d $out/example/*/ | head -n 1)front.png" --model $out/d3po_contrastive --out $out/views.png
