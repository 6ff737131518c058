-- Submit the input as two batches; both become visible, and start, at commit.
BEGIN;

-- One item per stanza, the payload is its text.
SELECT redrive.submit_query('load_package',
    'SELECT NULL::text, to_jsonb(body) FROM stanza ORDER BY no',
    label => 'load the package index');

-- One item per package, the key is its name: locked until the item is final.
-- The index may have a package in several versions.
SELECT redrive.submit_query('link_dependencies',
    $$SELECT name, jsonb_build_object('depends', field(body, 'Depends'))
      FROM (SELECT DISTINCT ON (name) no, name, body FROM stanza ORDER BY name, no) AS s
      ORDER BY no$$,
    label => 'link dependencies');

COMMIT;

-- An application fills a batch piece by piece, and dies before the end.
SELECT redrive.add_items(redrive.open_batch('load_package', label => 'forgotten'), ARRAY['{}', '{}', '{}']::jsonb[]);
