"""Does it work here? A checkpoint made, loaded from disk and from S3, and every rank's slices proved against safetensors.

    checkpoint   a Llama checkpoint of any size
    proof        what each rank must hold, said once more without this package's rules, plan or reader
    run          the loads
    table        what people see of it

It uses the package as any program would: `load_sharded`, `ShardedModel.run` and `ShardedModel.stats`.
"""
