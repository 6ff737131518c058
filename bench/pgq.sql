-- PgQ doing the same work inside the server: a transaction per PgQ batch, an exception block per event.
CREATE EXTENSION pgq;
SELECT pgq.create_queue('approve');
SELECT pgq.set_queue_config('approve', 'ticker_max_count', '1');
SELECT pgq.register_consumer('approve', 'worker');

CREATE PROCEDURE pgq_enqueue(p_n int, p_size int)
LANGUAGE plpgsql AS $$
DECLARE
    s int := 1;
BEGIN
    WHILE s <= p_n LOOP
        PERFORM count(pgq.insert_event('approve', 'approve', '{"id":' || g || '}'))
        FROM generate_series(s, least(s + p_size - 1, p_n)) AS g;
        COMMIT;
        PERFORM pgq.ticker('approve');
        COMMIT;
        s := s + p_size;
    END LOOP;
END
$$;

CREATE PROCEDURE pgq_consume()
LANGUAGE plpgsql AS $$
DECLARE
    b bigint;
    e record;
BEGIN
    LOOP
        b := pgq.next_batch('approve', 'worker');
        EXIT WHEN b IS NULL;
        FOR e IN SELECT ev_id, ev_data FROM pgq.get_batch_events(b) LOOP
            BEGIN
                PERFORM approve_todo((e.ev_data::jsonb ->> 'id')::bigint);
            EXCEPTION WHEN OTHERS THEN
                INSERT INTO failure VALUES ((e.ev_data::jsonb ->> 'id')::bigint, sqlerrm);
                PERFORM pgq.event_retry(b, e.ev_id, 3600);
            END;
        END LOOP;
        PERFORM pgq.finish_batch(b);
        COMMIT;
    END LOOP;
END
$$;
