# Handlers run as their owner and as nobody else, and a hostile owner holds up
# nobody but himself.  What one session can show is in test/sql/roles.sql.
#
# Seen red: each test says how.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('roles', conf => 'redrive.max_workers = 4');

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE ROLE mallory LOGIN;
CREATE ROLE bob LOGIN;
CREATE ROLE accomplice;
CREATE ROLE watcher LOGIN;
GRANT accomplice TO mallory;
SELECT redrive.grant_user('mallory'), redrive.grant_user('bob'), redrive.grant_monitor('watcher');
GRANT CREATE ON SCHEMA public TO mallory, bob;
});

sub as_role
{
	my ($role, $sql) = @_;
	return $node->safe_psql('postgres', $sql, extra_params => [ '-U', $role ]);
}

# Submit n items as a role and wait for the end of the batch, which has the label.
sub run_batch
{
	my ($role, $handler, $n, $label, $state) = @_;
	as_role($role, "SELECT redrive.submit('$handler', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, $n) AS i), label => '$label')");
	return batch_is($node, $label, $state);
}

as_role(
	'bob', q{
CREATE FUNCTION bob_works(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, 'bob');
    IF payload::int = 2 THEN
        RAISE EXCEPTION 'no' USING ERRCODE = '22000';
    END IF;
END $$;
SELECT redrive.create_handler('bob works', 'bob_works');
});

# --- code that is left for the commit: red without redrive_check_user_command
# in the utility hook, both ways; the items of the second batch run as accomplice
as_role(
	'mallory', q{
CREATE FUNCTION become() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    SET ROLE accomplice;
    RETURN '';
END $$;
CREATE TABLE late (n int);
GRANT INSERT ON late TO accomplice;
CREATE FUNCTION put_off() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.n = 1 THEN
        SET CONSTRAINTS ALL DEFERRED;
        INSERT INTO public.late VALUES (2);
    ELSE
        PERFORM public.become();
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER put_off AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION put_off();
CREATE FUNCTION mallory_holds(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects (item, note) VALUES (payload::int, 'mallory');
    IF payload::int = 1 THEN
        DECLARE held CURSOR WITH HOLD FOR SELECT public.become();
    END IF;
END $$;
CREATE FUNCTION mallory_defers(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects (item, note) VALUES (payload::int, 'mallory');
    IF payload::int = 1 THEN
        INSERT INTO public.late VALUES (1);
    END IF;
END $$;
} =~ s/DECLARE held (.*);/EXECUTE 'DECLARE held $1';/r);
as_role('mallory', "SELECT redrive.create_handler('holds', 'mallory_holds'), redrive.create_handler('defers', 'mallory_defers')");
foreach my $way ('holds', 'defers')
{
	run_batch('mallory', $way, 1, "$way first", 'paused');
	as_role('mallory', "SELECT redrive.submit('$way', ARRAY['2', '3']::jsonb[], label => '$way then')");
	batch_is($node, "$way then");
}
is($node->safe_psql('postgres', "SELECT DISTINCT login, role FROM effects WHERE note = 'mallory'"),
	'mallory|mallory', 'whatever is left for the commit, items run as their owner');

# --- what a session keeps: a lock, a temporary function and a table like ours, a
# prepared statement, a role setting of its own; the items after that and our
# books do without.  LISTEN, which nobody would answer, is refused by the server.
as_role(
	'mallory', q{
CREATE FUNCTION mallory_leaves(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.effects (item, note) VALUES (payload::int, 'leaves');
    IF payload::int = 1 THEN
        PERFORM pg_advisory_lock(hashtext('pg_redrive'), hashtext('rescue_stale')), pg_advisory_lock(1);
        CREATE TEMP TABLE batches (x int);
        CREATE FUNCTION pg_temp.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz';
        PREPARE redrive AS SELECT 1;
        BEGIN
            LISTEN redrive;
            RAISE EXCEPTION 'LISTEN in a worker';
        EXCEPTION WHEN feature_not_supported THEN
            NULL;
        END;
        PERFORM redrive.raise_validation('and an error');
    END IF;
END $$;
SELECT redrive.create_handler('leaves', 'mallory_leaves');
ALTER ROLE mallory SET role = 'accomplice';
ALTER ROLE mallory SET default_transaction_read_only = on;
ALTER ROLE mallory SET search_path = pg_temp, public;
});
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(pid) FROM redrive.workers');
run_batch('postgres', 'leaves', 40, 'leaves');
is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item), min(role), max(role) FROM effects WHERE note = 'leaves'"),
	'39|39|mallory|mallory', 'items run as their owner whatever the role sets for its sessions');
is($node->safe_psql('postgres', "SELECT count(*) > 0 FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) WHERE l.locktype = 'advisory' AND a.backend_type = 'redrive executor'"),
	't', 'a lock of the session is still held');
is($node->safe_psql('postgres', 'SELECT outcome FROM redrive.rescue_stale()'), 'done', '... and holds up no pass');
$node->safe_psql('postgres', 'ALTER ROLE mallory RESET ALL');

# --- a monitor sees the workers of all, another tenant does not: red with
# has_table_privilege(..., 'SELECT') as a condition of redrive.workers, and
# without the condition in redrive__slots
set_gate($node, 'watch', 0);
as_role(
	'mallory', q{
CREATE FUNCTION waits(key text, payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM public.wait_for_gate('watch');
    RAISE EXCEPTION 'message of %', key USING DETAIL = payload::text, ERRCODE = '22000';
END $$;
SELECT redrive.create_handler('waits', 'waits');
SELECT redrive.submit('waits', ARRAY['"payload s3cret"']::jsonb[], ARRAY['key s3cret'], label => 'waits');
});
ok(poll_until($node, "SELECT count(*) FROM redrive.workers WHERE handler = 'waits' AND item_no = 1", '1'), 'an item runs');
is(as_role('watcher', "SELECT role, item_no FROM redrive.workers WHERE handler = 'waits'"), 'mallory|1', 'a monitor sees its worker');
is(as_role('bob', "SELECT (SELECT count(*) FROM redrive.workers WHERE role <> 'bob'), (SELECT count(*) FROM redrive._slots() AS s WHERE s.owner <> 'bob'::regrole)"),
	'0|0', 'another tenant does not');
is(as_role('bob', "SELECT count(*) FROM pg_stat_activity WHERE query ~ 'waits' AND pid <> pg_backend_pid()"), '0', '... nor what it is doing');
unlike($node->safe_psql('postgres', "SELECT string_agg(query, ' ') FROM pg_stat_activity WHERE backend_type ~ 'redrive'"), qr/s3cret/, 'nobody sees keys or payloads there');
set_gate($node, 'watch', 1);
batch_is($node, 'waits');
unlike(as_role('watcher', join(' UNION ALL ', map { "SELECT v::text FROM redrive.$_ AS v" } qw(failed_items failure_groups failure_attempts batch_progress workers items item_status))),
	qr/s3cret/, 'a monitor sees neither key nor payload nor message');
# the statement that submits it is the test's own
unlike(join('', grep { !/statement: / && !/^\t/ } split /^/, slurp_file($node->logfile)), qr/s3cret/, 'the server log neither');

# --- locks.  mallory keeps the row of her batch locked, for good.
as_role(
	'mallory', q{
CREATE FUNCTION gated(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM public.wait_for_gate('lock');
    RAISE EXCEPTION 'no' USING ERRCODE = '22000';
END $$;
SELECT redrive.create_handler('gated', 'gated');
});
set_gate($node, 'lock', 0);
as_role('mallory', "SELECT redrive.submit('gated', ARRAY['1']::jsonb[], label => 'gated')");
ok(poll_until($node, "SELECT count(*) FROM redrive.workers WHERE handler = 'gated' AND item_no = 1", '1'), 'an item of mallory runs');
as_role('mallory', "BEGIN; SELECT redrive.pause_batch(batch_id) FROM redrive.batch_progress WHERE label = 'gated'; PREPARE TRANSACTION 'keeps'");
set_gate($node, 'lock', 1);
my $waiting = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive executor' AND wait_event_type = 'Lock'";
ok(poll_until($node, "SELECT count(*) FROM ($waiting) AS w", '1'), '... and her worker waits for her own lock');
# red with redrive_count_rule_hits before redrive_fold in run_or_give_back: bob's
# worker waits for the row of the rule, which hers has
run_batch('bob', 'bob works', 3, 'same rule');
# red with FROM chunks alone in redrive._fold_ended: the supervisor waits as well
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'redrive executor'");
ok(poll_until($node, "SELECT count(*) FROM ($waiting) AS w", '0'), 'her worker is terminated');
run_batch('bob', 'bob works', 3, 'supervised');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'redrive supervisor' AND wait_event_type = 'Lock'"), '0', 'the supervisor does not wait');
is($node->safe_psql('postgres', "SELECT count(outcome) FROM redrive.rescue_stale(now() + interval '1 day')"), '1', 'a pass does not wait');
$node->safe_psql('postgres', "ROLLBACK PREPARED 'keeps'; SELECT redrive.rescue_stale(now() + interval '1 day')");
batch_is($node, 'gated');

# --- rights that are taken away: mallory submits nothing more, what she has
# submitted is still hers and nobody else's
set_gate($node, 'lock', 0);
as_role('mallory', "SELECT redrive.submit('gated', ARRAY['1', '2']::jsonb[], label => 'revoked')");
$node->safe_psql('postgres', "SELECT redrive.revoke_user('mallory')");
set_gate($node, 'lock', 1);
batch_is($node, 'revoked');
is($node->psql('postgres', "SELECT redrive.send('gated', '1')", extra_params => [ '-U', 'mallory' ]), 3, 'without the right she submits nothing');
$node->safe_psql('postgres', "SELECT redrive.grant_user('mallory')");

# --- her objects go to accomplice, then she goes: her handlers do not
set_gate($node, 'lock', 0);
as_role('mallory', "SELECT redrive.submit('gated', ARRAY['1']::jsonb[], run_at => now() + interval '1 hour', label => 'later')");
$node->safe_psql('postgres', 'REASSIGN OWNED BY mallory TO accomplice; ALTER ROLE accomplice LOGIN; GRANT accomplice TO bob');
$node->safe_psql('postgres', "SELECT redrive.grant_user('accomplice')");
is(as_role('accomplice', 'SELECT count(*) FROM redrive.batch_progress'), '0', 'who gets the objects of a role does not get its handlers');
$node->safe_psql('postgres', 'DROP OWNED BY mallory; DROP ROLE mallory'); # as in any database, a session that she has goes on
$node->safe_psql('postgres', "UPDATE redrive.batches SET run_at = now(), serve_after = now() WHERE label = 'later'; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type ~ 'redrive (executor|supervisor)'");
ok($node->wait_for_log(qr/cannot start an executor for it.*\n.*The role has been dropped/), 'nobody takes the place of an owner that is gone');
run_batch('bob', 'bob works', 3, 'survivor');
is($node->safe_psql('postgres', "SELECT state, pending FROM redrive.batch_progress WHERE label = 'later'"), 'ready|1', 'the batch is not run');
is($node->psql('postgres', "SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE label = 'later'; SELECT redrive.drop_handler('gated')"), 0, 'a superuser can tidy up');
is($node->safe_psql('postgres', "SELECT DISTINCT login, role FROM effects WHERE note = 'bob'"), 'bob|bob', 'bob was bob all the time');
verified_ok($node, 'in the end');

$node->stop;
done_testing();
