"""Model families: tensor names and tensor-parallel rules, one file per family."""
