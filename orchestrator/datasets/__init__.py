"""Data sets by name, and batches of images in an order that can be resumed. Imports: config, storage.

A data set that fits into memory is a module with NUM_CLASSES, NUM_TRAIN and load(data) -> (train, test), each a pair of images and labels:
images (N, 1 or 3, H, W) float32 of data.image_size, normalised, and labels (N,) int64; splits.py names them. Images in files are
read and decoded when needed: image_folder, the formats in stored/, and shards in parquet/. loading.py makes batches of all of them.
"""
