#!/usr/bin/env bash
# The paper's experiment (Sec. 6) on one CUDA GPU: SDXL, DINOv2, LoFTR, LPIPS, renders of Objaverse.
# Each line can be run by itself, and the same command goes on where it stopped.
#   DATA=renders bash runs/paper.sh
#   DATA=renders SIZE=512 MEMORY="--lora 16" bash runs/paper.sh    larger, on a small GPU (runs/paper.md)
# Weights are downloaded once, or named by folder: BASE, DINO, LPIPS, and LOFTR by file (runs/paper.md).
# --small makes all counts tiny, in out/paper_small: does everything load and fit together?
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:?"a folder of renders: DATA=renders bash runs/paper.sh (data.py --meshes DIR --out renders)"}
base=${BASE:-stabilityai/stable-diffusion-xl-base-1.0} dino=${DINO:-facebook/dinov2-base}
lpips=${LPIPS:-hub} out=${OUT:-out/paper} size=${SIZE:-256} memory=${MEMORY:-}
# The paper's base model took 400 A100 days. 20,000 steps of attention alone are a start, not that model:
# by bench.py an hour each at 256 px and five at 512 on an A100, without VAE and reading.
sft="--steps 20000 --batch_size 4 --num_objects 100000 --eval_every 1000 --num_steps 50"
scorer="--num_references 240 --num_steps 50"
# The paper's setting (App. B): references noised by five scales, one object a step, the last 40 of 50 calls.
# The last call has no density: 39 are left. (results/README.md, 3: how little that teaches. Ours:
# D3PO="--loss diffusion_dpo --batch_objects 8")
# States, actions and frozen means of 240 references take 5 GB of main memory at 256 px, 18 GB at 512.
setting="--trained_calls 10 48 --candidates noised --beta_dpo 0.1 --kl 0 --lambda_simple 1 --batch_objects 1"
d3po="--num_references 240 --steps 1800 --num_steps 50 --batch_size 1 --eval_objects 16"
table="--n 200 --seeds 3 --num_steps 50"
matching="matching --matcher ${LOFTR:-loftr}"
if [ "${1:-}" = "--small" ]; then
    out=${OUT:-out/paper_small}
    sft="--steps 2 --batch_size 2 --eval_every 1 --num_steps 3 --eval_objects 2"
    scorer="--num_references 3 --num_val 2 --batch_size 2 --steps 2 --eval_every 1 --num_steps 3"
    setting=${setting/10 48/1 3}
    d3po="--num_references 3 --steps 2 --num_steps 5 --batch_size 1 --eval_objects 2"
    table="--n 2 --num_steps 3"
    matching="random" # a picture of a random model matches nothing, and ties alone are an error
fi

# What is missing shows now, not after days
python -c "
import torch, evaluate, matcher, scorer
evaluate.Lpips.load('$lpips')
scorer.pretrained_scorer('$dino', 'bilinear')
if '$matching' != 'random': matcher.loftr_model('${LOFTR:-loftr}', torch.device('cpu'))"

# Stage 1: the multi-view model, and the independent-view (Zero123-style) one that draws the negatives
sft="--preset sdxl --base $base --image_size $size --data $data --lr 5e-5 $sft"
sft="$sft --augment False --attention_only True --checkpointing True"
python train_sft.py $sft $memory --out $out/base
python train_sft.py $sft $memory --cross_view False --out $out/zero123

# Stage 2: the scorer, against Zero123-style views, and against the multi-view model's own: C (pre)
# (Ours, where cameras are orthographic: --data and --image_size alone, without --negatives.)
scorer="--head bilinear --texture 0 --mismatch 1 --lr 1e-5 --image_size $size $scorer"
scorer="--backbone $dino --data $data $scorer"
python train_scorer.py $scorer --negatives $out/zero123 --out $out/scorer
python train_scorer.py $scorer --negatives $out/base --out $out/scorer_pre

# Stage 3: SFT (the same loop without preferences), MV-D3PO-M, MV-D3PO-C (pre), MV-D3PO-C.
# tune NAME RUN OPTIONS: $out/NAME links to this run; $out/RUN is only the last one of its loss and feedback
d3po="--model $out/base --data $data --lr 1e-5 --attention_only True --checkpointing True --out $out $d3po"
d3po="$d3po $memory ${D3PO:-$setting}"
tune() { python train_d3po.py $d3po "${@:3}" && ln -sfn "$(readlink $out/$2)" $out/$1; }
case "${D3PO:-}" in *diffusion_dpo*) loss=diffusion_dpo ;; *) loss=d3po ;; esac
tune sft sft_baseline --feedback none
tune m ${loss}_${matching%% *} --feedback $matching
tune c_pre ${loss}_contrastive --feedback contrastive --scorer $out/scorer_pre
tune c ${loss}_contrastive --feedback contrastive --scorer $out/scorer

# Table 1 on the held-out objects, each row named by its run: another run is another row. Another model's views
# join by: evaluate.py --images DIR
table="--data $data --split heldout --scorer $out/scorer --lpips $lpips $table"
run() { basename "$(readlink -f $out/$1)"; }
sft=$out/table_$(run sft).json
[ -e $sft ] || python evaluate.py --model $out/sft $table --out $sft --grid ${sft%.json}.png
for row in base m c_pre c; do
    name=$out/table_$(run $row)_minus_$(run sft)
    [ -e $name.json ] || python evaluate.py --model $out/$row $table --against $sft --out $name.json \
        --grid $name.png
    echo "$row: $name.json"
done
