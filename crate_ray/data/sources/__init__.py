"""Where images come from: one file a source, each giving a `Source` that `crate_ray.data.build` writes as shards."""
