#!/bin/bash
#SBATCH --job-name=cc3m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=72
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

# Five minutes before the time is up Slurm signals this shell (B:). Hand it on to the launchers, wait for the checkpoint,
# and queue the job again.
trap 'stopped=1; kill -TERM "$step"' TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m cloob train cc3m --data cc3m/train.csv --out runs/cc3m --workers 8 --save-every 500 --resume auto &
step=$!
wait "$step"
code=$?
if [ -n "$stopped" ]; then
  wait "$step"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
