"""The stages of synthesis, one file each, in the order of `synth.config.STAGES`."""
