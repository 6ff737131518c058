# redrive-top and the shortcuts for psql run, as a monitor, and show what is there.
# Fails if a view loses a column that they name, if \watch repeats only the last query, or an argument is not checked.
use strict;
use warnings;

use FindBin;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $root = "$FindBin::Bin/../..";
my $node = new_node('psql', conf => "redrive.max_workers = 0\n");
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE watcher LOGIN;
SELECT redrive.grant_monitor('watcher');
CREATE FUNCTION approve(payload jsonb) RETURNS void LANGUAGE sql AS 'SELECT 1 / (payload ->> 0)::int';
SELECT redrive.create_handler('approve', 'approve');
SELECT redrive.submit('approve', ARRAY['["secret"]', '["0"]']::jsonb[], label => 'the first');
CALL redrive.work();
SELECT redrive.submit('approve', ARRAY['["1"]']::jsonb[], label => 'the second');
BEGIN;
SELECT redrive.create_platform('crm', 'https://crm.example/');
SELECT redrive.pause_platform('crm');
COMMIT;
SQL
local %ENV = ($node->_get_env(), PGUSER => 'watcher', PGDATABASE => 'postgres');

# run a program; return its exit code, output and errors
sub run
{
	my (@command) = @_;
	my ($out, $err) = ('', '');

	IPC::Run::run(\@command, '<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout(60));
	return ($? >> 8, $out, $err);
}

my $top = "$root/scripts/redrive-top";
my ($rc, $out, $err) = run($top, '--once');
is($rc, 0, 'redrive-top --once');
is($err, '', 'without errors');
like($out, qr/\b$_\b/, "it shows $_") foreach ('pg_redrive', 'BATCH', 'HANDLER', 'WORKER', 'PLATFORM', 'STALE', 'the second', 'crm');
unlike($out, qr/secret/, 'and no payloads');
($rc, $out) = run($top, '--once', 'dbname=postgres application_name=top');
is($rc, 0, 'with a connection string');

# two rounds of \watch, all queries in each
{
	my ($seen, $said) = ('', '');
	my $process = IPC::Run::start([ $top, '--interval', '0.1' ], '<', \undef, '>', \$seen, '2>', \$said, IPC::Run::timeout(60));
	$process->pump until (() = $seen =~ /\bSTALE\b/g) >= 2 || !$process->pumpable;
	$process->kill_kill;
	cmp_ok(scalar(() = $seen =~ /\bBATCH\b/g), '>=', 2, 'batches again and again');
	cmp_ok(scalar(() = $seen =~ /\bPLATFORM\b/g), '>=', 2, 'platforms, too');
	is($said, '', 'nothing else was said');
}

($rc, $out) = run($top, '--help');
is($rc, 0, '--help');
like($out, qr/--interval 10/, 'says how');
foreach my $wrong ([ '--interval', '0' ], [ '--interval', '3601' ], [ '--interval=1; SELECT 1' ], ['--interval'], ['--what'], [ 'a', 'b' ])
{
	($rc, $out, $err) = run($top, @$wrong);
	is($rc, 2, "refused: @$wrong");
	like($err, qr/^redrive-top: .*\nTry "redrive-top --help"\.$/, 'and told why');
}
($rc, $out, $err) = run($top, '--once', 'template1');
isnt($rc, 0, 'a database without the extension is an error');
my ($before, $after) = $err =~ /(relation "redrive\.)\w+(" does not exist)/;
like(slurp_file("$root/docs/operations.md"), qr/^\| .*`\Q$before\E\xe2\x80\xa6\Q$after\E`/m, '... which docs/operations.md explains');

# The report, by the command in the docs, in a database of another encoding.  Seen red: with psql alone the page is in that encoding, and does
# not say so.
{
	my ($command) = slurp_file("$root/docs/reference.md") =~ /^(.*psql .*report_html\(\)") > report\.html$/m;
	delete local $ENV{PGUSER};
	$node->safe_psql('postgres', "CREATE DATABASE cn ENCODING 'EUC_CN' LOCALE 'C' TEMPLATE template0");
	$node->safe_psql('cn', "CREATE EXTENSION pg_redrive; CREATE FUNCTION approve(payload jsonb) RETURNS void LANGUAGE sql AS '';"
			. "SET client_encoding = 'UTF8'; SELECT redrive.create_handler('\xe5\xae\xa1\xe6\x89\xb9', 'approve')");
	local $ENV{PGDATABASE} = 'cn';
	($rc, $out, $err) = run('bash', '-c', $command);
	like($out, qr/<meta charset="utf-8">.*<td>\xe5\xae\xa1\xe6\x89\xb9</s, 'a report in a database of another encoding says what it is in') or diag($err);
}

# the shortcuts, all of them, each explained
my @words = slurp_file("$root/examples/psqlrc") =~ /^\\set (\w+) /mg;
my $doc = slurp_file("$root/docs/psql.md");
is(join(' ', grep { index($doc, "| `:$_` |") < 0 } @words), '', 'docs/psql.md has each shortcut');
my $script = PostgreSQL::Test::Utils::tempdir() . '/words.sql';
append_to_file($script, join('', map { ":$_\n" } @words));
{
	local $ENV{PSQLRC} = "$root/examples/psqlrc";
	($rc, $out, $err) = run('psql', '-v', 'ON_ERROR_STOP=1', '-f', $script);
}
is($rc, 0, 'the shortcuts run');
is($err, '', 'without errors');
is(scalar(() = $out =~ /^\(\d+ rows?\)$/mg), scalar @words, 'and each shows rows');

$node->stop;
done_testing();
