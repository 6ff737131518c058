# The example workers in examples/workers, checked as any worker may be checked:
# by the scripts of test/conformance.
use strict;
use warnings;

use FindBin;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $top = "$FindBin::Bin/../..";
my $node = new_node('workers');

$node->safe_psql(
	'postgres', q{
CREATE ROLE worker LOGIN;
GRANT CREATE ON DATABASE postgres TO worker;
SELECT redrive.grant_user('worker');
});

# where the packages of Debian and of npm install -g are
my $node_path = '/usr/share/nodejs:/usr/local/lib/node_modules:/usr/lib/node_modules';

# Run a script of the conformance test; return its output, one string.
sub script
{
	my ($name, @options) = @_;
	my ($out, $err) = ('', '');

	IPC::Run::run([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), @options, '-f', "$top/test/conformance/$name.sql" ],
		'<' => \undef, '>' => \$out, '2>' => \$err, IPC::Run::timer(2 * $PostgreSQL::Test::Utils::timeout_default));
	return $out . $err;
}

# Check one worker, and that it ends when it is told to.
sub check_worker
{
	my ($name, @command) = @_;
	my ($out, $err) = ('', '');

	script('setup', '-U', 'worker');
	my $worker;
	{
		local %ENV = (
			$node->_get_env(), PGUSER => 'worker', PGDATABASE => 'postgres',
			NODE_PATH => $node_path);

		$worker = IPC::Run::start([ @command, "$top/examples/workers/$name", 'conformance' ],
			'<' => \undef, '>' => \$out, '2>' => \$err, IPC::Run::timer(2 * $PostgreSQL::Test::Utils::timeout_default));
	}
	my $answer = script('check', '-v', "patience=$PostgreSQL::Test::Utils::timeout_default s");
	unlike($answer, qr/^FAILED|ERROR/m, "$name keeps the contract");
	like($answer, qr/^(\d+) passed, 0 failed$/m, '... in all its points');

	# it may be waiting for work: give it some
	$worker->signal('TERM');
	$node->safe_psql('postgres', q{SELECT redrive.send('conformance', '{"n": 1}')});
	ok(poll_until($node, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'worker'", '0'), '... and ends when it is told to');
	ok($worker->finish, '... as it should');
	like($err, qr/is not claimed with lease token/, '... after it had been told once that it came too late');
	diag($answer . $err) unless Test::More->builder->is_passing;
	$node->safe_psql('postgres', q{SELECT redrive.cancel_batch(batch_id) FROM redrive.batch_progress WHERE state NOT IN ('finished', 'cancelled')});
	$node->safe_psql('postgres', q{DROP SCHEMA conformance CASCADE; SELECT redrive.drop_handler('conformance')});
	return;
}

# the Python that has Debian's packages
check_worker('worker.py', '/usr/bin/python3');
SKIP:
{
	local $ENV{NODE_PATH} = $node_path;
	skip 'the package pg of Node.js is not installed', 1 unless IPC::Run::run([ 'node', '-e', 'require("pg")' ], '<' => \undef, '>&' => \my $ignored);
	check_worker('worker.js', 'node');
}
check_worker('worker.php', 'php');
check_worker('worker.sh', 'bash');

# a worker that breaks the contract is found out
script('setup', '-U', 'worker');
my $broken = $node->basedir . '/broken.py';
my $code = slurp_file("$top/examples/workers/worker.py");
is($code =~ s/n \* n\)/n * n + 1)/, 1, 'a worker is made that writes something else');
append_to_file($broken, $code);
my $worker;
{
	local %ENV = ($node->_get_env(), PGUSER => 'worker', PGDATABASE => 'postgres');
	$worker = IPC::Run::start([ '/usr/bin/python3', $broken, 'conformance' ], '<' => \undef, '>' => \my $out, '2>' => \my $err);
}
my $answer = script('check', '-v', "patience=$PostgreSQL::Test::Utils::timeout_default s");
like($answer, qr/^FAILED  each has one row with its result: expected 60 rows, 60 items, sum 73810, got 60 rows, 60 items, sum 73870$/m, '... and found out');
like($answer, qr/ERROR:  the worker does not keep the contract/, '... which is an error');
$worker->kill_kill;

foreach my $name ('worker.py', 'worker.js', 'worker.php', 'worker.sh')
{
	cmp_ok(scalar(split /\n/, slurp_file("$top/examples/workers/$name")), '<', 80, "$name is short");
}

$node->stop;
done_testing();
