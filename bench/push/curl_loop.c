/*
 * The least that sending takes: POST n requests over so many connections at once, and print how many per second.
 *     curl_loop URL N IN_FLIGHT
 * No database, and nothing is kept.
 */
#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static const char body[] = "{\"task_key\" : \"k1\", \"status\" : \"s\", \"version\" : 1, \"process\" : \"p\", \"payload\" : {\"n\": 1}}";

static size_t
discard(char *data, size_t size, size_t n, void *arg)
{
	return size * n;
}

static double
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int
main(int argc, char **argv)
{
	const long	n = argc == 4 ? atol(argv[2]) : 0;
	const int	in_flight = argc == 4 ? atoi(argv[3]) : 0;
	long		started = 0,
				failed = 0;
	CURLM	   *multi = curl_multi_init();
	struct curl_slist *headers = curl_slist_append(NULL, "Content-Type: application/json");
	double		began = now();

	if (n <= 0 || in_flight <= 0)
		return fprintf(stderr, "usage: curl_loop URL N IN_FLIGHT\n"), 2;
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, (long) in_flight * 2);
	for (; started < in_flight; started++)
	{
		CURL	   *easy = curl_easy_init();

		curl_easy_setopt(easy, CURLOPT_URL, argv[1]);
		curl_easy_setopt(easy, CURLOPT_POSTFIELDS, body);
		curl_easy_setopt(easy, CURLOPT_HTTPHEADER, headers);
		curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, discard);
		curl_easy_setopt(easy, CURLOPT_NOPROXY, "*");
		curl_multi_add_handle(multi, easy);
	}
	for (long done = 0; done < n;)
	{
		CURLMsg    *msg;
		int			running,
					left;

		curl_multi_perform(multi, &running);
		while ((msg = curl_multi_info_read(multi, &left)) != NULL)
		{
			CURL	   *easy = msg->easy_handle;

			failed += msg->data.result != CURLE_OK;
			done++;
			curl_multi_remove_handle(multi, easy);
			if (started < n)
			{
				started++;
				curl_multi_add_handle(multi, easy);
			}
		}
		if (done < n)
			curl_multi_poll(multi, NULL, 0, 1000, NULL);
	}
	if (failed > 0)
		return fprintf(stderr, "%ld requests failed\n", failed), 1;
	printf("%.0f\n", n / (now() - began));
	return 0;
}
