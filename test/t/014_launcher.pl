# Databases: workers find each database that has the extension, by themselves,
# and keep nobody from dropping the extension or the database.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('launcher', extension => 0);
my $handler = q{
CREATE FUNCTION do_item(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO effects (item, note) VALUES (payload::int, current_database());
    PERFORM wait_for_gate('items');
END $$;
SELECT redrive.create_handler('work', 'do_item', isolation => 'item');
};

# Submit items to the handler of a database.
sub submit
{
	my ($dbname, $label, $items) = @_;
	$node->safe_psql($dbname,
		"SELECT redrive.submit('work', ARRAY(SELECT to_jsonb(i) FROM generate_series(1, $items) AS i), label => '$label')");
	return;
}

# Return the query that counts our processes in a database.
sub processes
{
	my ($dbname) = @_;
	return "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'redrive%' AND datname = '$dbname'";
}

# --- the extension is created while the server runs, in several databases
foreach my $dbname ('one', 'two', 'three')
{
	$node->safe_psql('postgres', "CREATE DATABASE $dbname");
	create_effects($node, $dbname);
	$node->safe_psql($dbname, 'CREATE EXTENSION pg_redrive');
	$node->safe_psql($dbname, $handler);
}
submit($_, 'first', 100) foreach ('one', 'two', 'three');
foreach my $dbname ('one', 'two', 'three')
{
	batch_is($node, 'first', 'finished', $dbname);
	is($node->safe_psql($dbname, 'SELECT count(*), count(DISTINCT item), min(note), max(note) FROM effects'),
		"100|100|$dbname|$dbname", "the items of database $dbname were done there, once");
	verified_ok($node, $dbname, $dbname);
}
is($node->safe_psql('postgres', processes('postgres')), '0', 'nobody stays in a database without the extension');

# an extension whose creation is rolled back is not there
$node->safe_psql('postgres', "BEGIN; CREATE EXTENSION pg_redrive; ROLLBACK");
submit('one', 'after rollback', 1);
batch_is($node, 'after rollback', 'finished', 'one');

# --- DROP EXTENSION while executors idle
cmp_ok($node->safe_psql('postgres', processes('one')), '>', 0, 'workers are in database one');
$node->safe_psql('one', 'DROP EXTENSION pg_redrive CASCADE', timeout => 120);
pass('the extension is dropped while executors are idle');
ok(poll_until($node, processes('one'), '0'), 'they leave the database');

# --- again, while an executor is within an item
set_gate($node, 'items', 0, 'two');
submit('two', 'held', 10);
ok(poll_until($node, "SELECT count(*) > 0 FROM redrive.workers WHERE item_no IS NOT NULL", 't', dbname => 'two'), 'executors are within items');
$node->safe_psql('two', 'DROP EXTENSION pg_redrive CASCADE', timeout => 120);
pass('the extension is dropped while executors run');
set_gate($node, 'items', 1, 'two');
ok(poll_until($node, processes('two'), '0'), 'they leave the database');

# --- it can be created again, and works
foreach my $dbname ('one', 'two')
{
	$node->safe_psql($dbname, 'DROP FUNCTION IF EXISTS do_item(jsonb); CREATE EXTENSION pg_redrive');
	$node->safe_psql($dbname, $handler);
	submit($dbname, 'again', 10);
	batch_is($node, 'again', 'finished', $dbname);
	verified_ok($node, "$dbname again", $dbname);
}

# --- databases can be dropped and renamed under our workers
submit('two', 'last', 10);
batch_is($node, 'last', 'finished', 'two');
cmp_ok($node->safe_psql('postgres', processes('two')), '>', 0, 'workers are in database two');
$node->safe_psql('postgres', 'DROP DATABASE two', timeout => 120);
pass('a database is dropped while executors are idle');
$node->safe_psql('postgres', 'ALTER DATABASE three RENAME TO four', timeout => 120);
pass('a database is renamed');
submit('four', 'renamed', 10);
batch_is($node, 'renamed', 'finished', 'four');
$node->safe_psql('postgres', 'CREATE DATABASE five TEMPLATE four', timeout => 120);
pass('a database is used as template');
submit('four', 'copied', 10);
batch_is($node, 'copied', 'finished', 'four');
$node->safe_psql('five', q{DELETE FROM effects});
submit('five', 'copy', 10);
batch_is($node, 'copy', 'finished', 'five');
is($node->safe_psql('five', 'SELECT count(*), min(note) FROM effects'), '10|five', 'workers find the copy');

$node->stop;
done_testing();
