"""What tests share: configs, corpora, models, processes, whole lives of runs."""
