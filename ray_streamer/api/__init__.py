"""What do people call? `load_sharded` on Ray, `load_rank` and `stream_rank` in processes of their own, `plan` without loading."""
