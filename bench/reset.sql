-- Fresh to-do items without dead rows, :permille of them failing, spread at random; then a checkpoint.
TRUNCATE todo, failure;
INSERT INTO todo
SELECT g, 'pending', CASE WHEN abs(hashint8(g)::bigint) % 1000 < :permille THEN -1 ELSE g % 1000 END, NULL
FROM generate_series(1, :n) AS g;
VACUUM (ANALYZE) todo;
CHECKPOINT;
