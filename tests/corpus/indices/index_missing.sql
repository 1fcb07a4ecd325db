DROP INDEX cloob_items_content;
