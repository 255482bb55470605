"""How data is made: prompt streams, vLLM generation, teacher scoring and the weight wires."""
