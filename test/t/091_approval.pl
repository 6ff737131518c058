# The example of approvals runs as it stands, and what it leaves is what it tells.
#
# Seen red: without on_unlock in examples/approval/handlers.sql tasks stay locked.
use strict;
use warnings;

use FindBin;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my $node = new_node('approval', extension => 0);
my ($out, $err) = ('', '');
my $rc;

{
	local %ENV = $node->_get_env();
	$rc = IPC::Run::run([ 'psql', '-X', '-d', 'postgres', '-f', "$FindBin::Bin/../../examples/approval/run.sql" ],
		'<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout(120));
}
ok($rc, 'the example runs to its end') or diag($out);
is($err, '', '... and says nothing else');
note($out);

# ask(query, expected, name)
sub ask
{
	my ($query, $expected, $name) = @_;

	is($node->safe_psql('postgres', "SET search_path = approval; $query"), $expected, $name);
	return;
}

ask(q{SELECT string_agg(task_id::text, ' ' ORDER BY task_id) FROM tasks WHERE done AND task_id < 1000}, '101 102 103 107 108 109', 'the tasks that could be approved are');
ask(q{SELECT string_agg(form_id::text, ' ' ORDER BY form_id) FROM bookings WHERE form_id < 1000}, '1 2 3 7 8 9', '... and were booked, each once');
ask('SELECT count(*), count(DISTINCT form_id) FROM bookings WHERE form_id > 1000', '19998|19998', 'so were those of the set handler');
ask('SELECT count(*) FROM tasks WHERE locked', '0', 'no task is locked');
ask('SELECT code FROM cost_centers AS c WHERE spent <> (SELECT sum(amount) FROM bookings AS b WHERE b.cost_center = c.code)', '', 'the money adds up');
ask('SELECT run_no, succeeded, ignored, failed FROM reports ORDER BY run_no', "4|5|2|2\n5|6|2|1", 'each run that ended was reported once');
ask("SELECT string_agg(recipient, ' ' ORDER BY recipient) FROM sent_messages WHERE recipient <> 'approver'", 'anna ben clara gina hugo ida',
	'who was approved was told so once, and nobody else');
ask("SELECT count(*) FROM sent_messages WHERE recipient = 'approver'", '4', 'the approver was told of each run');
is($node->safe_psql('postgres', 'SELECT count(*) FROM redrive.locks'), '0', 'all keys are unlocked');
verified_ok($node, 'all batches');

$node->stop;
done_testing();
