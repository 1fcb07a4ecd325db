UPDATE cloob_models SET spec = 'https://127.0.0.1:9/model.pt';
