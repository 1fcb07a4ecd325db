UPDATE cloob_models SET spec = 'hf-hub:evil/tracker';
