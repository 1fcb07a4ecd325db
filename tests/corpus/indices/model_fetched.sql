UPDATE cloob_model SET spec = 'https://127.0.0.1:9/model.pt';
