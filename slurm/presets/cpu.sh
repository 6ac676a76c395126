# Four whole CPU nodes: the offline encoder, or everything after `embed`.
resources=(
    --partition=cpu
    --nodes=4
    --cpus-per-task=64
    --mem=256G # 64 workers at execution.memory_gb=4 (tiles and buffers, at most); the driver: 250 bytes an image
    --time=1-00:00:00
)
