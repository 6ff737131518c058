# Handlers that misbehave: one that never ends, deferred constraints, errors
# that come at commit only, and code that tries to change who or what we are.
# The guilty item fails; the others, and our books, are as if nothing was.
#
# Seen red: with AtEOXact_GUC(true, ...) in leave_user_code of src/flow/segment.c
# items find the settings of others and bookkeeping fails; without
# SECURITY_LOCAL_USERID_CHANGE in enter_user_code roles can be changed; with
# "deferred = false" in redrive_fire_deferred item 8 of the deferred batch fails.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('segment');

create_effects($node);
$node->safe_psql(
	'postgres', q{
CREATE ROLE mallory LOGIN;
CREATE ROLE accomplice;
GRANT accomplice TO mallory;
SELECT redrive.grant_user('mallory');
GRANT CREATE ON SCHEMA public TO mallory;
GRANT CREATE ON DATABASE postgres TO mallory;
});

# Submit items 1 to n as postgres and wait for the end.
sub run_batch
{
	my ($handler, $n) = @_;
	$node->safe_psql('postgres',
		"SELECT redrive.submit('$handler', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, $n) AS i), label => '$handler')");
	batch_is($node, $handler);
	return;
}

# The failures of a handler, one a line.
sub failures
{
	my ($handler) = @_;
	return $node->safe_psql('postgres',
		"SELECT item_no, state, error_class, sqlstate FROM redrive.failed_items WHERE handler = '$handler' ORDER BY item_no");
}

# The items that a handler did, as a list, each as often as it was done.
sub effects
{
	my ($note) = @_;
	return $node->safe_psql('postgres', "SELECT string_agg(item::text, ' ' ORDER BY item) FROM effects WHERE note = '$note'");
}

# --- a handler that loops for ever
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION looping(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, 'looping');
    WHILE payload::int = 4 LOOP
        NULL;
    END LOOP;
END $$;
SELECT redrive.create_handler('looping', 'looping', item_timeout => '300 ms', max_retries => 1, retry_delay => '10 ms');
});
run_batch('looping', 8);
is(failures('looping'), '4|failed|timeout|57014', 'a handler that never ends fails as a timeout');
is(effects('looping'), '1 2 3 5 6 7 8', '... and the batch goes on');

# --- deferred constraints
# Items 3 and 7 break one.  Item 8 needs deferral: child first, then parent.
$node->safe_psql(
	'postgres', q{
CREATE TABLE parents (id int PRIMARY KEY);
CREATE TABLE children (id int, parent int CONSTRAINT children_parent_fkey REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION deferred(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, 'deferred');
    INSERT INTO children VALUES (payload::int, payload::int);
    IF payload::int NOT IN (3, 7) THEN
        INSERT INTO parents VALUES (payload::int);
    END IF;
END $$;
SELECT redrive.create_handler('deferred', 'deferred', max_retries => 0, commit_interval => '1 hour');
});
run_batch('deferred', 20);
is(failures('deferred'), "3|failed|missing_parent|23503\n7|failed|missing_parent|23503", 'only the guilty items fail');
is(effects('deferred'), join(' ', grep { $_ != 3 && $_ != 7 } 1 .. 20), 'the others are committed, each once');
is($node->safe_psql('postgres', "SELECT DISTINCT constraint_name FROM redrive.failed_items WHERE handler = 'deferred'"),
	'children_parent_fkey', 'the constraint is told');

# the name of the constraint is that of another one too, which is not deferrable
$node->safe_psql(
	'postgres', q{
CREATE TABLE strangers (id int, parent int CONSTRAINT children_parent_fkey REFERENCES parents);
TRUNCATE children, parents, strangers;
SELECT redrive.create_handler('ambiguous', 'deferred', max_retries => 0, commit_interval => '1 hour');
DELETE FROM effects;
});
run_batch('ambiguous', 20);
is(failures('ambiguous'), "3|failed|missing_parent|23503\n7|failed|missing_parent|23503", 'the same when the name is ambiguous');
is(effects('deferred'), join(' ', grep { $_ != 3 && $_ != 7 } 1 .. 20), '... and the others are committed, each once');

# a constraint trigger of the application, with an error of its own
$node->safe_psql(
	'postgres', q{
CREATE TABLE checked (id int);
CREATE FUNCTION check_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.id % 5 = 0 THEN
        PERFORM redrive.raise_validation('five');
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER checked_late AFTER INSERT ON checked DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION check_late();
CREATE FUNCTION late(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, 'late');
    INSERT INTO checked VALUES (payload::int);
END $$;
SELECT redrive.create_handler('late', 'late');
});
run_batch('late', 12);
is(failures('late'), "5|ignored|validation|RD001\n10|ignored|validation|RD001", 'errors of deferred triggers are classified like others');
is(effects('late'), '1 2 3 4 6 7 8 9 11 12', '... and the others are committed, each once');

# --- an error that comes at commit and not before: of temporary tables that are to be emptied there
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION at_commit(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, 'at commit');
    IF payload::int = 5 THEN
        CREATE TEMP TABLE emptied (id int PRIMARY KEY) ON COMMIT DELETE ROWS;
        CREATE TEMP TABLE kept (id int REFERENCES emptied);
    END IF;
END $$;
SELECT redrive.create_handler('at commit', 'at_commit', commit_interval => '1 hour');
INSERT INTO redrive.classification_rules (handler, sqlstate_pattern, error_class, action) VALUES ('at commit', '0A000', 'at_commit', 'fail');
});
run_batch('at commit', 12);
is(failures('at commit'), '5|failed|at_commit|0A000', 'an error at commit is that of the guilty item');
is(effects('at commit'), '1 2 3 4 6 7 8 9 10 11 12', '... and the others are committed, each once');

# --- code that tries to change who and what we are
# Each item notes what it finds, then does its mischief; every third one raises
# an error after it.
my $mischief = q{
CREATE SCHEMA evil_SUFFIX;
CREATE FUNCTION evil_SUFFIX.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$SELECT 'infinity'::timestamptz$$;
CREATE FUNCTION evil_SUFFIX.evil_equal(bigint, bigint) RETURNS boolean LANGUAGE sql AS $$SELECT false$$;
CREATE OPERATOR evil_SUFFIX.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil_SUFFIX.evil_equal);
CREATE TABLE evil_SUFFIX.found (item int, found text);
CREATE TABLE evil_SUFFIX.tried (item int, did text, result text);
CREATE FUNCTION evil_SUFFIX.mischief(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    deeds text[] := ARRAY[
        'SET ROLE accomplice',
        'SET SESSION AUTHORIZATION postgres',
        'RESET SESSION AUTHORIZATION',
        'RESET ROLE',
        'SET search_path = evil_SUFFIX, pg_temp, pg_catalog',
        'CREATE TEMP TABLE failures (x int); CREATE TEMP TABLE chunks (x int); CREATE TEMP TABLE batches (x int); CREATE TEMP TABLE handlers (x int); CREATE TEMP TABLE locks (x int)',
        'CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS ''SELECT NULL::timestamptz''',
        'SET transaction_read_only = on',
        'SET default_transaction_read_only = on',
        'SET default_transaction_isolation = serializable',
        'SET statement_timeout = 1',
        'SET lock_timeout = 1',
        'SET idle_in_transaction_session_timeout = 1',
        'SET datestyle = ''German''; SET intervalstyle = ''iso_8601''; SET timezone = ''Asia/Tokyo''; SET lc_numeric = ''C''; SET extra_float_digits = -15',
        'SET row_security = off',
        'SET work_mem = ''64 kB''; SET enable_indexscan = off; SET enable_seqscan = off; SET jit = off',
        'SET application_name = ''somebody else''',
        'SET CONSTRAINTS ALL DEFERRED',
        'DECLARE open_cursor CURSOR FOR SELECT 1',
        'PREPARE fence AS SELECT 1',
        'UPDATE redrive.failures SET state = ''ignored''',
        'UPDATE redrive.chunks SET done = 0',
        'DELETE FROM redrive.locks',
        'SELECT redrive._fold(1)',
        'COMMIT',
        'ROLLBACK'];
    did text := deeds[1 + payload::int % cardinality(deeds)];
    v_result text := 'done';
BEGIN
    INSERT INTO evil_SUFFIX.found VALUES (payload::int, format('%s %s %s %s %s %s %s %s %s', session_user, current_user,
        current_setting('search_path'), current_setting('transaction_read_only'), current_setting('statement_timeout'),
        current_setting('datestyle'), current_setting('timezone'), current_setting('row_security'), current_setting('application_name')));
    INSERT INTO public.effects (item, note) VALUES (payload::int, 'SUFFIX');
    BEGIN
        -- a superuser may spoil our tables
        IF did NOT LIKE '%redrive%' OR NOT (SELECT rolsuper FROM pg_roles WHERE rolname = session_user) THEN
            EXECUTE did;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        v_result := SQLSTATE;
    END;
    IF payload::int % 3 = 0 THEN
        RAISE EXCEPTION 'third' USING ERRCODE = 'RD001';
    END IF;
    IF did NOT LIKE '%read_only%' THEN
        INSERT INTO evil_SUFFIX.tried VALUES (payload::int, did, v_result);
    END IF;
END $$;
SELECT redrive.create_handler('mischief_SUFFIX', 'evil_SUFFIX.mischief');
};

# Check the traces of a batch of n items.
sub check_mischief
{
	my ($suffix, $n) = @_;
	my $good = $n - int($n / 3);

	batch_is($node, "mischief_$suffix");
	is($node->safe_psql('postgres', "SELECT succeeded, ignored, failed FROM redrive.batch_progress WHERE label = 'mischief_$suffix'"),
		"$good|" . int($n / 3) . '|0', "$suffix: outcomes are recorded");
	is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT item) FROM effects WHERE note = '$suffix'"),
		"$good|$good", "$suffix: each item is done once");
	is($node->safe_psql('postgres', "SELECT count(DISTINCT found) FROM evil_$suffix.found"), '1', "$suffix: no item finds what another has changed")
	  or diag($node->safe_psql('postgres', "SELECT found, min(item), count(*) FROM evil_$suffix.found GROUP BY 1"));
	is( $node->safe_psql('postgres', "SELECT DISTINCT did, result FROM evil_$suffix.tried WHERE did ~ 'ROLE|AUTH|COMMIT|ROLLBACK' AND result = 'done'"),
		'', "$suffix: roles cannot be changed, transactions cannot be ended");
	is($node->safe_psql('postgres', "SELECT count(*) FROM redrive.locks"), '0', "$suffix: keys are unlocked");
	verified_ok($node, $suffix);
	return;
}

my $submit = q{SELECT redrive.submit('mischief_SUFFIX', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, 300) AS i),
    ARRAY(SELECT 'key ' || i FROM generate_series(1, 300) AS i), label => 'mischief_SUFFIX')};

# by executors, owned by an ordinary role and by a superuser
foreach my $role ('mallory', 'postgres')
{
	$node->safe_psql('postgres', ($mischief . $submit) =~ s/SUFFIX/$role/gr, extra_params => [ '-U', $role ]);
	check_mischief($role, 300);
}
like($node->safe_psql('postgres', "SELECT found FROM evil_mallory.found LIMIT 1"), qr/^mallory mallory /, 'an executor is its owner');
is( $node->safe_psql('postgres', "SELECT DISTINCT result FROM evil_mallory.tried WHERE did ~ 'redrive'"),
	'42501', 'an ordinary role cannot touch our tables');

# in the foreground, where temporary tables and settings outlive the batch
$node->append_conf('postgresql.conf', 'redrive.max_workers = 0');
$node->restart;
my $out = $node->safe_psql('postgres',
	(($mischief . $submit) =~ s/SUFFIX/foreground/gr) . ";\nCALL redrive.work();\nCALL redrive.work();\nSELECT 'still here', current_user, session_user, current_setting('search_path');",
	extra_params => [ '-U', 'mallory' ]);
like($out, qr/still here\|mallory\|mallory\|"\$user", public$/, 'the session is as it was');
check_mischief('foreground', 300);

$node->stop;
done_testing();
