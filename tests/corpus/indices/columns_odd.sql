UPDATE cloob_items SET columns = '{"a": ["\ud800", 1], "b": {"c": null}, "d": 1e999, "e": NaN}';
