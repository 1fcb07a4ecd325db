UPDATE models SET spec = 'hf-hub:evil/tracker';
