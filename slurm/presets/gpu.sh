# Four nodes of eight GPUs: learned encoders, and k-means on every GPU.
resources=(
    --partition=gpu
    --nodes=4
    --gpus-per-node=8
    --cpus-per-task=96 # twelve a GPU decode 3,000 images of 500 x 375 a second
    --mem=480G
    --time=2-00:00:00
)
