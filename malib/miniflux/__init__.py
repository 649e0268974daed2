"""The bundled models: their scenes, text, training, probes and evaluator."""
