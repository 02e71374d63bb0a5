#!/usr/bin/env bash
# Table 1 at the toy preset, on held-out objects. Resumable: the same command goes on where it stopped, and two shells may
# share the work: SEEDS=0 in one, SEEDS="1 2" in the other (the scorers first), then once more without.
#   bash runs/table1.sh            results/table1/ (7 hours of one core)
#   bash runs/table1.sh --small    the same path in a quarter of an hour, on numbers too small to mean anything
# LPIPS=hub in front (or a folder with the two published files of weights) adds that column; where there are measurements
# without it, delete out/table1/eval first.
set -euo pipefail
cd "$(dirname "$0")/.."

out=out/table1 results=results/table1 seeds=${SEEDS:-"0 1 2"}
scorer="--num_objects 240 --num_steps 10"
d3po="--num_objects 240"
table="--n 200" watch="--eval_every 20" feedback="--n 64"
if [ "${1:-}" = "--small" ]; then
    out=out/table1_small results=out/table1_small/results seeds="0 1"
    scorer="--num_objects 4 --num_val 4 --steps 2 --eval_every 2 --num_steps 3"
    d3po="--num_objects 2 --eval_objects 2 --steps 2 --num_steps 4 --first_call 1"
    table="--n 3 --num_steps 3" watch="--eval_every 1" feedback="--n 2 --num_steps 3"
fi

# once FILE COMMAND...: run what makes FILE, unless it is there
once() { if [ ! -e "$1" ]; then "${@:2}"; fi; }

# Stage 2: the scorers of MV-D3PO-C and MV-D3PO-C (pre)
python train_scorer.py $scorer --out $out/scorer
python train_scorer.py $scorer --negatives pretrained --out $out/scorer_pre
judges="--scorer $out/scorer $out/scorer_pre ${LPIPS:+--lpips $LPIPS}"

for seed in $seeds; do
    # Stage 3: every row from the same candidates, with the same objects, batches and number of steps. First as in the
    # paper, attention layers only
    d3po_all=$d3po d3po="$d3po --attention_only True --lr 1e-4"
    run() { once $out/$folder/$1/results.json python train_d3po.py --out $out/$folder --name $1 --seed $seed $d3po $watch "${@:2}"; }
    folder=seed$seed # of the candidates, and of what is trained on them
    run sft --beta_dpo 0 --scorer $out/scorer
    run sft_low --beta_dpo 0 --lr 2e-5 --scorer $out/scorer # is SFT's rate to blame?
    run m --feedback matching --scorer $out/scorer
    run c_pre --feedback contrastive --scorer $out/scorer_pre
    run c --feedback contrastive --scorer $out/scorer
    run hull --feedback hull --scorer $out/scorer
    d3po=$d3po_all # and all layers
    run sft_all --beta_dpo 0 --scorer $out/scorer
    run m_all --feedback matching --scorer $out/scorer
    run c_pre_all --feedback contrastive --scorer $out/scorer_pre
    run c_all --feedback contrastive --scorer $out/scorer
    run hull_all --feedback hull --scorer $out/scorer
    run ns_all --feedback noise_scale --scorer $out/scorer # control: no feedback at all
    watch="" # curves of the first seed only
    folder=nine$seed # more candidates over the same noise scales
    run c_nine_all --feedback contrastive --scorer $out/scorer --noise_scales 0 .05 .1 .2 .3 .4 .5 .65 .8

    # Table 1: the same 200 held-out objects and the same noise for every row
    measure() { once $out/eval/$1_$seed.json python evaluate.py --split heldout $table $judges --seed $seed --known_rows False --out $out/eval/$1_$seed.json "${@:2}"; }
    known="" # images of known quality, once
    if [ $seed = 0 ]; then known="--known_rows True"; fi
    measure pre --model checkpoints/toy $known
    for row in sft sft_low m c_pre c hull sft_all m_all c_pre_all c_all hull_all ns_all; do
        measure $row --model $out/seed$seed/$row --images_out $out/images/${row}_$seed
    done
    measure c_nine_all --model $out/nine$seed/c_nine_all
    # any other model takes part with a folder of its views: here the Zero123-style one
    drawn=$out/eval/independent_model_$seed.json
    once $drawn python evaluate.py --model checkpoints/toy_independent --split heldout $table --seed $seed \
        --known_rows False --images_out $out/images/independent_$seed --out $drawn
    measure independent --images $out/images/independent_$seed
done

# What each feedback can see; also the paper's own scorer, an additive head and no mismatch term, on the same negatives
for negatives in "" _pre; do
    mkdir -p $out/scorer_concat$negatives
    once $out/scorer_concat$negatives/negatives.json cp $out/scorer$negatives/negatives.* $out/scorer_concat$negatives
done
python train_scorer.py $scorer --head concat --mismatch 0 --out $out/scorer_concat
python train_scorer.py $scorer --head concat --mismatch 0 --negatives pretrained --out $out/scorer_concat_pre
once $results/feedback.md python -m runs.feedback --split heldout $feedback --out $results/feedback \
    --scorers $out/scorer $out/scorer_pre $out/scorer_concat $out/scorer_concat_pre

python data.py --toys 200 --size 64 --seed 3 --out $out/images/truth
python -m runs.table1 --out $out --results $results
