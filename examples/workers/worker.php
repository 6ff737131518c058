#!/usr/bin/env php
<?php
// An external worker of pg_redrive in PHP, with PDO (Debian: php-cli, php-pgsql).
// Usage: worker.php HANDLER; the database is that of PGHOST, PGPORT, PGUSER, PGDATABASE.  What it does with an
// item is do_item(); the rest is the same for every worker.  SIGTERM: it ends after the claim it is in.
declare(strict_types=1);

const CLAIM = "SELECT * FROM redrive.claim(?, max_items => 50, lease => '2 min', worker => 'worker.php', wait => '5 s')";
const COMPLETE = 'SELECT redrive.complete(?, ?, ARRAY(SELECT o FROM jsonb_populate_recordset(NULL::redrive.outcome, ?::jsonb) AS o))';

// The work: the square of n, stored in the database.  An exception is the end of this item only.
function do_item(PDO $db, array $item): void
{
    $n = json_decode($item['payload'], true)['n'] ?? null;
    is_int($n) || throw new InvalidArgumentException('n is not a number');
    $db->prepare('INSERT INTO conformance.done (batch_id, item_no, attempt, result) VALUES (?, ?, ?, ?)')
        ->execute([$item['batch_id'], $item['item_no'], $item['attempt'], $n * $n]);
}

// What an error means: the decision is the worker's.
function outcome(array $item, Exception $error): array
{
    if ($error instanceof InvalidArgumentException) {
        [$kind, $code, $message] = ['failed', 'E-INPUT', $error->getMessage()];
    } else {
        $code = $error->errorInfo[0];
        $kind = $code === 'RD001' ? 'ignored' : (in_array(substr($code, 0, 2), ['22', '23']) ? 'failed' : 'retry');
        preg_match('/^ERROR:  (.*)$/m', $error->errorInfo[2], $found);
        $message = $found[1] ?? $error->getMessage();
    }
    return ['item_no' => $item['item_no'], 'outcome' => $kind, 'code' => $code, 'message' => $message];
}

// Claim items, do them, and say what became of them, in one transaction with what they wrote.
function work(PDO $db, string $handler): void
{
    $claim = $db->prepare(CLAIM);
    $claim->execute([$handler]); // committed at once
    $items = $claim->fetchAll(PDO::FETCH_ASSOC);
    if (!$items) {
        return;
    }
    $claimed = [$items[0]['chunk_id'], $items[0]['lease_token']];
    $exceptions = [];
    $db->beginTransaction();
    try {
        foreach ($items as $item) {
            $db->exec('SAVEPOINT item');
            try {
                do_item($db, $item);
            } catch (InvalidArgumentException | PDOException $error) {
                $exceptions[] = outcome($item, $error);
                $db->exec('ROLLBACK TO item'); // fails when the connection is lost
            }
        }
        $db->prepare(COMPLETE)->execute([...$claimed, json_encode($exceptions)]);
        $db->commit();
    } catch (PDOException $error) {
        $db->inTransaction() && $db->rollBack(); // not when it was the commit that failed
        if ($error->errorInfo[0] !== 'RD004') { // that is: too late, others do it
            $db->prepare('SELECT redrive.release(?, ?)')->execute($claimed);
        }
        throw $error; // it is told below, which waits a moment: the claim may come again at once
    }
}

$stop = false;
pcntl_async_signals(true);
pcntl_signal(SIGTERM, function () use (&$stop) { $stop = true; });
while (!$stop) {
    try {
        $db ??= new PDO('pgsql:', getenv('PGUSER') ?: null, null, [PDO::PGSQL_ATTR_DISABLE_PREPARES => true]); // for poolers
        work($db, $argv[1]);
    } catch (PDOException $error) {
        fwrite(STDERR, $error->getMessage() . "\n");
        $db = null; // connect again
        sleep(1);
    }
}
