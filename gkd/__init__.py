"""What is computed: contracts, divergences, objectives, configuration. Torch only: no Ray, vLLM or DeepSpeed."""
